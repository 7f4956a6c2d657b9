"""Studies read from their files: recipes, equal parameters, claims, and messages."""

import textwrap
from pathlib import Path

import pytest

from diffusion_moe.cli import main
from diffusion_moe.config import ModelConfig
from diffusion_moe.counts import model_size
from diffusion_moe.study.claims import Pair, read_claim
from diffusion_moe.study.definition import read_study

HEAD = """
recipe: digits
output: out
reference: dense
"""
VARIANTS = """
variants:
  dense: {model.router: dense}
  dsmoe: {match: model.expert_dim}
"""


@pytest.fixture
def read(tmp_path):
    """Reads the text of a study."""

    def read(text):
        file = tmp_path / "study.yaml"
        file.write_text(textwrap.dedent(text))
        return read_study(file)

    return read


def test_runs_go_seed_by_seed_and_differ_from_the_base_by_their_overrides(read):
    study = read(HEAD + VARIANTS + "seeds: [3, 1]\noverrides: {training.steps: 200, model: {depth: 2}}\n")
    runs = list(study.runs())
    assert [(run.seed, run.variant) for run in runs] == [(3, "dense"), (3, "dsmoe"), (1, "dense"), (1, "dsmoe")]
    assert {(run.recipe.model.depth, run.recipe.training.steps) for run in runs} == {(2, 200)}
    assert [run.recipe.training.seed for run in runs] == [3, 3, 1, 1]
    assert {run.recipe.logging.validate_every for run in runs} == {10}  # 20 held-out losses
    assert len({run.hash for run in runs}) == 4


def test_a_matched_width_is_the_nearest_one(read):
    study = read(HEAD + VARIANTS)
    recipes = study.recipes
    wanted = model_size(recipes["dense", "all"].model).activated
    model = vars(recipes["dsmoe", "all"].model)
    distances = {
        width: abs(model_size(ModelConfig(**model | {"expert_dim": width})).activated - wanted)
        for width in range(1, 400)
    }
    assert model["expert_dim"] == min(distances, key=distances.get)
    study.check_equal()


def test_scales_and_variants_at_a_scale(read):
    study = read(
        HEAD
        + """
scales: {small: {}, large: {model.hidden_size: 216}}
variants:
  dense: {model.router: dense, at: {large: {model.mlp_dim: 900}}}
  dsmoe: {match: model.expert_dim}
  tc: {model.router: tc, match: model.expert_dim, scales: [small]}
"""
    )
    assert list(study.recipes) == [
        ("dense", "small"), ("dsmoe", "small"), ("tc", "small"), ("dense", "large"), ("dsmoe", "large")
    ]  # fmt: skip
    assert study.recipes["dense", "small"].model.mlp_width == 432
    assert study.recipes["dense", "large"].model.mlp_width == 900
    study.check_equal()


def test_unequal_parameters_are_refused_with_their_numbers_before_any_run(read, tmp_path, capsys):
    read(HEAD + "variants:\n  dense: {model.router: dense}\n  wide: {model: {router: dense, mlp_dim: 864}}\n")
    assert main(["study", str(tmp_path / "study.yaml")]) == 2
    message = capsys.readouterr().err
    assert "wide at all: " in message and "% of " in message and "mark a variant `unequal: true`" in message
    assert message.count("\n") == 1
    assert not Path("out").exists()


def test_an_unequal_variant_may_be_marked(read):
    read(
        HEAD
        + "variants:\n  dense: {model.router: dense}\n  wide: {model: {router: dense, mlp_dim: 864}, unequal: true}"
    ).check_equal()


def test_a_width_that_changes_nothing_cannot_be_matched(read):
    with pytest.raises(ValueError, match=r"variant wide has .* cannot match .*; match another width"):
        read(HEAD + "variants:\n  dense: {model.router: dense}\n  wide: {model.router: dense, match: model.expert_dim}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants: {dense: {model.router: dense}, a: {model.dept: 2}}", "variant a: there is no model.dept; did you"),
        ("variants: {a: {}}", "the reference 'dense' is no variant; choose one of a"),
        ("seeds: [0, 0]" + VARIANTS, "seeds are \\[0, 0\\]; give each once"),
        ("variants: {dense: {training.seed: 3}}", "variant dense sets training.seed; give seeds instead"),
        ("variants: {dense: {model.router: dense}, a: {model.router: dense}}", "dense and a have the same recipe"),
        ("variants: {dense: {at: {big: {}}}}", "variant dense: there is no scale 'big'; choose one of all"),
        ("variants: {dense: {match: model.depth}}", "match is 'model.depth'; choose one of model.expert_dim"),
        ("modules: [no_such_module]" + VARIANTS, "modules: no_such_module cannot be imported"),
        ("claims: [{text: t, better: dsmoe, worse: ec}]" + VARIANTS, "claim 1 names the variant 'ec', which the study"),
        ("claims: [{text: t, better: dsmoe}]" + VARIANTS, "claim 1 lacks better or worse; give both, or a chain"),
        ("claims: [{text: t, chain: [dense, dsmoe], metric: loss}]" + VARIANTS, "metric is loss; expected one of val_"),
    ],
)
def test_mistakes_are_one_line(read, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(f"{HEAD}\n{text}")
    assert "\n" not in str(error.value)


def test_a_chain_compares_each_level_with_the_next():
    claim = read_claim({"text": "t", "chain": ["a", "b", ["c", "d"]]}, "abcd", "here")
    assert claim.pairs == (Pair("a", "b"), Pair("b", "c"), Pair("b", "d"))
    lists = read_claim({"text": "t", "better": ["a", "b"], "worse": ["c", "d"]}, "abcd", "here")
    assert lists.pairs == (Pair("a", "c"), Pair("a", "d"), Pair("b", "c"), Pair("b", "d"))


def test_the_plan_needs_no_torch(read, tmp_path):
    import subprocess
    import sys

    read(HEAD + VARIANTS)
    code = (
        "import sys; from diffusion_moe.cli import main; "
        f"assert main(['study', {str(tmp_path / 'study.yaml')!r}, '--plan']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 runs, 0 done" in done.stdout
    assert "dsmoe" in done.stdout and "expert_dim" in done.stdout


def test_the_studies_of_the_repository_are_equal():
    root = Path(__file__).parents[2]
    study = read_study(root / "benchmarks" / "study.yaml")
    study.check_equal()
    assert len(study.claims) == 15 and study.scales == ["1M", "4M"]
    for scale, millions in (("1M", 1), ("4M", 4)):
        activated = model_size(study.recipes["dense", scale].model).activated
        assert 0.9e6 * millions < activated < 1.2e6 * millions
        for name, times in (("dense-2x", 2), ("dense-3x", 3)):
            if (name, scale) in study.recipes:
                found = model_size(study.recipes[name, scale].model).activated
                assert found / activated == pytest.approx(times, rel=0.1)
    assert ("dense-2x", "4M") in study.recipes and ("dense-3x", "1M") in study.recipes
