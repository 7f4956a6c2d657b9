"""What fields say of themselves, and their old names."""

import dataclasses
import re

import pytest
import yaml

from diffusion_moe.cli import main
from diffusion_moe.config import SECTIONS, DataConfig, ModelConfig, current_names, names_where, read_recipe, unread_by
from diffusion_moe.config.renamed import RENAMED, current_sections
from diffusion_moe.routing_rules import RULES

STATE = {"optimizer.kind", "training.posthoc_ema_stds"}
"""Settings that say what a checkpoint holds, so that they cannot change either."""
ALL = [(section, field) for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(("section", "field"), ALL, ids=[f"{section}.{field.name}" for section, field in ALL])
def test_every_field_is_classified(section, field):
    """A new field declares when it may change; one of the model also what of the weights it changes."""
    assert field.metadata["change"] in ("never", "asked", "constant", "always")
    assert (field.metadata["affects"] in ("weights", "labels", "positions", "nothing")) == (section == "model")
    assert (field.metadata["change"] == "never") == (section in ("model", "init") or f"{section}.{field.name}" in STATE)
    assert field.metadata["group"] in ((None, "text", "experts") if section == "model" else (None,))
    assert set(field.metadata["kinds"]) <= {"digits", "shapes", "folder", "huggingface", "webdataset", "latents"}


def test_help_texts_and_metadata_agree_on_kinds():
    """Fields that one kind reads name it at the end of their docstring."""
    from diffusion_moe.cli.help import field_docs

    for field in dataclasses.fields(DataConfig):
        if len(field.metadata["kinds"]) == 1:
            assert f"(kind: {field.metadata['kinds'][0]})" in field_docs(DataConfig)[field.name], field.name


def test_settings_of_rules_are_settings_of_experts():
    experts = names_where(ModelConfig, group="experts")
    for router, rule in RULES.items():
        assert rule.reads <= experts
        assert not unread_by(router) & rule.reads
    assert unread_by("tc") >= {"capacity", "n_group"} and unread_by("dsmoe") >= {"capacity"}
    assert unread_by("dense") == experts - {"router"}


@pytest.mark.parametrize("old", [name for name in RENAMED if "." in name and not name.startswith("start")])
def test_an_old_name_answers_with_the_new_one(old, capsys, tmp_path):
    section, _, field = old.partition(".")
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({section: {field: 1}}))
    for arguments, dashes in ((["digits", f"--{old}=1"], "--"), ([str(tmp_path / "old.yaml")], "")):
        assert main(["train", *arguments, "--output_dir", str(tmp_path / "run")]) == 2
        err = capsys.readouterr().err
        assert f"{dashes}{old} is now {dashes}{RENAMED[old]}" in err and "; rename it" in err and err.count("\n") == 1


def test_the_old_section_answers_too(capsys, tmp_path):
    (tmp_path / "old.yaml").write_text("start: {source: x}\n")
    for arguments, message in (
        (["digits", "--start.source=x"], "--start.source is now --init.from_checkpoint; rename it"),
        (["digits", "--start.lora-rank=2"], "--start.lora_rank is now --init.lora_rank; rename it"),
        ([str(tmp_path / "old.yaml")], f"recipe {tmp_path / 'old.yaml'}: start is now init; rename it"),
    ):
        assert main(["train", *arguments]) == 2
        assert capsys.readouterr().err == f"diffusion-moe: {message}\n"


def test_new_names_exist():
    known = {f"{section}.{field.name}" for section, field in ALL} | set(SECTIONS)
    assert set(RENAMED.values()) <= known and not RENAMED.keys() & known


def test_what_the_version_before_wrote_is_read(tmp_path):
    old = {"num_groups": 2, "top_groups": 1, "routed_scale": 2.5, "interleave": True, "skip_first": 1, "depth": 4}
    new = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "moe_layer_freq": 2, "first_k_dense": 1}
    assert current_names(old) == new | {"depth": 4}
    assert current_names({"interleave": False}) == {"moe_layer_freq": 1}
    assert current_names(new) == new
    sections = {"model": old, "start": {"source": "x", "freeze": []}, "training": {"max_bad_steps": 2}}
    assert current_sections(sections) == {
        "model": new | {"depth": 4},
        "init": {"from_checkpoint": "x", "freeze": []},
        "training": {"max_nonfinite_steps": 2},
    }


def test_a_run_of_the_version_before_is_read(tmp_path):
    from diffusion_moe.config import to_dict
    from diffusion_moe.run_folder import RunFolder

    recipe = read_recipe("digits", ["--model.moe_layer_freq=1", "--training.extra_ema_decays=[0.5]"])
    sections = to_dict(recipe)
    inverse = {new: old for old, new in RENAMED.items()}
    written = {
        inverse.get(section, section): {
            inverse.get(f"{section}.{name}", f"{section}.{name}").partition(".")[2]: value
            for name, value in fields.items()
        }
        for section, fields in sections.items()
    }
    written["model"]["interleave"] = False
    text = yaml.safe_dump(written)
    assert all(re.search(rf"\b{old.partition('.')[2] or old}:", text) for old in RENAMED)
    (tmp_path / "recipe.yaml").write_text(text)
    assert RunFolder(tmp_path).read_recipe() == recipe
