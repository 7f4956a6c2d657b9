"""Reports of models that take text: prompts instead of classes, and text tokens that are routed too."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyarrow import parquet

from diffusion_moe import DiT
from diffusion_moe.analysis import record_routing
from diffusion_moe.analysis.findings import gather_findings
from diffusion_moe.analysis.losses import HELD_OUT_BINS
from diffusion_moe.analysis.run import panels
from diffusion_moe.cli import main
from diffusion_moe.config import read_recipe
from diffusion_moe.data import load_dataset
from diffusion_moe.diffusion.loss import flow_loss
from diffusion_moe.diffusion.path import rectified_flow
from diffusion_moe.evaluation.options import TextOptions
from diffusion_moe.evaluation.shapes_scorer import questions_in_turn
from diffusion_moe.randomness import normal
from diffusion_moe.sampling.generate import Prompts, generate_batches
from diffusion_moe.sampling.loading import load_text_encoder, load_weights
from diffusion_moe.sampling.source import read_source
from diffusion_moe.shapes.prompts import CATEGORIES, SPLITS, evaluation_prompts
from diffusion_moe.text import TextFeatures

QUICK = ["--num_samples=24", "--steps=3"]
WIDTH, LENGTH, POSITIONS, TOP_K = 16, 16, 16, 2


@pytest.fixture(scope="module")
def joint_run(make_shapes_run):
    """Text and image in one sequence, two experts a token."""
    router = ["--model.router=dsmoe", f"--model.top_k={TOP_K}", "--model.depth=4"]
    return make_shapes_run("--model.text_conditioning=joint", *router)


def gathered(folder, prompts=None, **settings):
    """What a report would be made of."""
    source = read_source(folder)
    settings = replace(source.settings, **{"num_samples": 24, "steps": 3} | settings)
    return gather_findings(source, settings, log=lambda line: None, asked=TextOptions(prompts=prompts))


def tiny_model(conditioning, router="dsmoe"):
    model = DiT(
        sample_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=0, num_experts=4,
        expert_dim=16, router=router, top_k=TOP_K, text_dim=WIDTH, text_length=LENGTH, text_conditioning=conditioning,
    )  # fmt: skip
    return model.eval()


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_rows_are_kinds_of_prompts_and_no_prompt(conditioning):
    model, x = tiny_model(conditioning), torch.randn(6, 1, 8, 8)
    mask = torch.arange(4)[None] < torch.tensor([4, 2, 1, 0, 3, 0])[:, None]
    tokens = POSITIONS + (LENGTH if conditioning == "joint" else 0)
    with torch.no_grad(), record_routing(model, 2, positions=True, kinds=3) as record:
        record.kinds_B = torch.tensor([0, 2, 2])  # twice: image 0 and 3 are of kind 0, ...
        model(x, torch.tensor(0.7), None, torch.randn(6, 4, WIDTH), mask)
    counts = record.counts()
    # Images 3 and 5 have no prompt.
    expected = [1, 0, 3, 2]
    np.testing.assert_array_equal(counts.images_SK, [[0] * 4, expected])
    np.testing.assert_array_equal(counts.tokens_LSK, [[[0] * 4, [tokens * n for n in expected]]])
    np.testing.assert_array_equal(counts.served_LSK, TOP_K * counts.tokens_LSK)
    np.testing.assert_array_equal(counts.compute_SKP, np.full((2, 4, POSITIONS), TOP_K) * counts.images_SK[..., None])
    text = LENGTH if conditioning == "joint" else 0
    np.testing.assert_array_equal(counts.others_SK, TOP_K * text * counts.images_SK)
    with torch.no_grad(), record_routing(model) as record:
        model(x, torch.tensor(0.7), None, torch.randn(6, 4, WIDTH))  # no mask: all have a prompt
    np.testing.assert_array_equal(record.counts().images_SK.sum(0), [6, 0])
    with pytest.raises(ValueError, match="kinds_B has 4 kinds for a pass of 6"), record_routing(model) as record:
        record.kinds_B = torch.zeros(4, dtype=torch.long)
        model(x, torch.tensor(0.7), None, torch.randn(6, 4, WIDTH))
    classes, message = DiT(depth=2), "kinds is 2, but the model takes no prompts"
    with pytest.raises(ValueError, match=message), record_routing(classes, kinds=2):
        pass


def test_questions_take_turns():
    asked = questions_in_turn(29, seed=4)
    seen, held_out = (evaluation_prompts(4, 3, split) for split in SPLITS)
    assert asked[:12] == seen[::3] + held_out[::3] and asked[12:24] == seen[1::3] + held_out[1::3]
    assert [prompt.category for prompt in asked] == [CATEGORIES[i % 6] for i in range(29)]


def test_compute_is_counted_by_category(shapes_run):
    """Compared with each image sampled alone, whose routing nothing else can have mixed with."""
    found = gathered(shapes_run, guidance_scale=2.0)
    assert found.class_names == ["single object", "two object", "counting", "colors", "position", "color attr"]
    source, asked = read_source(shapes_run), questions_in_turn(24, 0)
    model = load_weights(source)
    text = TextFeatures.together(load_text_encoder(source).encode_all([prompt.text for prompt in asked]))
    settings = replace(source.settings, num_samples=24, steps=3, guidance_scale=2.0, batch_size=1)
    served, null = np.zeros((6, 4), dtype=int), np.zeros(4, dtype=int)
    with record_routing(model, 3) as record:
        prompts = Prompts(text, text.nothing())
        for prompt, _ in zip(asked, generate_batches(model, None, 24, settings, prompts=prompts)):
            counts = record.counts().served_LSKE.sum((0, 1))
            served[CATEGORIES.index(prompt.category)] += counts[0]
            null += counts[1]
            record.clear()
    sampling = found.sampling
    np.testing.assert_allclose(sampling.counts.served_LSKE.sum((0, 1)), served, atol=3)  # thresholds near a tie
    np.testing.assert_allclose(sampling.null_served_LSE.sum((0, 1)), null, atol=3)
    assert len({tuple(row) for row in served}) == 6
    np.testing.assert_array_equal(sampling.counts.images_SK.sum(0), [4 * 3] * 6)
    np.testing.assert_allclose(sampling.groups.served_RK.sum(0), served.sum(1), atol=6)
    assert not sampling.tokens and sampling.about["prompts"]["count"] == 24
    # The examples are the first images, one of each category.
    assert sampling.examples.classes_I == list(range(6))
    assert sampling.examples.texts == [prompt.text for prompt in asked[:6]]
    P = sampling.examples.compute_ISP.shape[2]
    alone = sampling.examples.compute_ISP.mean((1, 2))
    assert P == POSITIONS and np.isfinite(alone).all() and len(set(alone)) > 1


def test_text_tokens_are_counted_apart_from_image_tokens(joint_run):
    found = gathered(joint_run)
    image, text = found.sampling.tokens["image"], found.sampling.tokens["text"]
    layers = len(found.sampling.counts.tokens_LSK)
    np.testing.assert_array_equal(text.tokens_S, [24 * LENGTH * layers] * 3)
    np.testing.assert_array_equal(image.tokens_S, [24 * POSITIONS * layers] * 3)
    np.testing.assert_array_equal(text.served_S, TOP_K * text.tokens_S)
    np.testing.assert_array_equal(image.served_S, TOP_K * image.tokens_S)
    assert found.sampling.counts.positions_LEP.sum() + text.served_S.sum() * 2 == 2 * 24 * 3 * layers * TOP_K * (
        POSITIONS + LENGTH
    )  # guidance evaluates every image twice


def test_the_report_speaks_of_prompts(shapes_run, joint_run, tmp_path):
    for run, routed in ((shapes_run, False), (joint_run, True)):
        assert main(["analyze", str(run), "--output", str(tmp_path), *QUICK]) == 0
        page = (tmp_path / "report.html").read_text()
        assert "24 images, 4 of each of 6 categories, prompts: coloured shapes" in page
        assert "Routing with and without the prompt" in page and "evaluations with a prompt" in page
        assert "with first captions, no dropout" in page and "256 held-out images of shapes" in page
        assert "Prompts from above: " in page or routed  # dsmoe has no maps
        assert ("experts a text token</dt><dd>2.000" in page) == routed
        assert ("text tokens’ share of all assignments</dt><dd>50.0%" in page) == routed
        for absent in ("no class", "by class", "of the class", "every class", "Classes"):
            assert absent not in page
        table = parquet.read_table(tmp_path / "data" / "routing.parquet")
        names = {*[name.replace("_", " ") for name in CATEGORIES], "no prompt"}
        assert set(table["class_name"].to_pylist()) == names
        about = json.loads(table.schema.metadata[b"diffusion_moe"])
        assert about["sampling"]["prompts"]["count"] == 24 and about["sampling"]["text_encoder"]["width"] == WIDTH


def test_prompts_of_a_file_are_compared_if_they_are_few(shapes_run, tmp_path):
    few, many = tmp_path / "few.txt", tmp_path / "many.txt"
    few.write_text("a red square\na blue circle\n")
    many.write_text("".join(f"a red square {i}\n" for i in range(25)))
    found = gathered(shapes_run, few)
    assert found.class_names == ["a red square", "a blue circle"] and found.kind == "prompt"
    np.testing.assert_array_equal(found.sampling.counts.images_SK.sum(0), [12 * 3, 12 * 3])
    by_name = {panel.name: panel for some in panels(found).values() for panel in some}
    assert by_name["hard_to_easy"].title == "Prompts from hard to easy" and by_name["hard_to_easy"].figure is not None
    found = gathered(shapes_run, many)
    by_name = {panel.name: panel for some in panels(found).values() for panel in some}
    assert found.class_names == ["all"] and "classes" not in by_name
    nothing = by_name["hard_to_easy"]
    assert nothing.figure is None and "Give --prompts FILE with 2 to 24 prompts" in nothing.caption
    assert by_name["experts"].title == "Which expert serves which time"
    assert by_name["guidance"].figure is not None  # the only row is not "no prompt"


def test_held_out_loss_is_of_the_first_captions(shapes_run):
    found = gathered(shapes_run).held_out[0]
    recipe, source = read_recipe(shapes_run / "recipe.yaml"), read_source(shapes_run)
    data = load_dataset(replace(recipe.data, text_encoder=None), "test")
    model, row, s = load_weights(source), 7, 3
    index = round(row * (len(data) - 1) / 255)
    text = load_text_encoder(source).encode([data.captions(index)[0]])
    t = torch.tensor([(s + 0.5) / HELD_OUT_BINS])
    noise = normal(0, "held_out", s, torch.tensor([row]), (3, 16, 16))
    point = rectified_flow(data.read([index]).images, noise, t)
    with torch.no_grad():
        out = model(point.x_t, t, None, *text[:2])
    expected = flow_loss(out.sample, point, "velocity", None, recipe.model.min_gap)
    assert found.loss_IS[row, s] == pytest.approx(float(expected), rel=1e-4)


def test_mistakes_are_one_line(shapes_run, tmp_path, tiny, capsys):
    assert main(["train", "digits", "--output_dir", str(tmp_path / "run"), *tiny, "--training.steps=1"]) == 0
    assert main(["convert", str(shapes_run), "--output", str(tmp_path / "pipeline")]) == 0
    capsys.readouterr()
    for folder, options, expected in [
        (tmp_path / "run", ["--prompts=a.txt"], "takes no text; remove the option"),
        (tmp_path / "pipeline", [], "is no run, so it has no captions of its own; give --prompts FILE"),
        (shapes_run, ["--prompts=/no/such.txt"], "cannot read prompts from /no/such.txt"),
        (shapes_run, ["--text_encoder=/no/such"], "cannot load the text encoder /no/such"),
    ]:
        assert main(["analyze", str(folder), *QUICK, *options]) == 2
        err = capsys.readouterr().err
        assert expected in err and err.count("\n") == 1
