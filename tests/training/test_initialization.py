"""Where training begins: at another model's weights, with other classes, positions, frozen parts and adapters."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from diffusion_moe import DiT
from diffusion_moe.config import InitConfig, ModelConfig, Recipe, read_recipe
from diffusion_moe.data import load_dataset
from diffusion_moe.models import load_model, make_model
from diffusion_moe.models.adapters import load_lora
from diffusion_moe.nn.position import sincos_table
from diffusion_moe.training.initialization import (
    Pretrained,
    check_settings,
    freeze_and_add_adapters,
    initialize_from,
    label_rows,
    relabelled,
    share_frozen,
)
from diffusion_moe.training.layout_checks import check_adapters
from diffusion_moe.training.loop import train
from diffusion_moe.training.state import make_state
from diffusion_moe.training.step import train_step

SMALL = ModelConfig(sample_size=8, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=4, num_experts=4,
                    expert_dim=16)  # fmt: skip
CPU = torch.device("cpu")


def pretrained_of(config=SMALL, names=("a", "b", "c", "d"), space=None):
    """A model none of whose weights is zero."""
    torch.manual_seed(1)
    model = make_model(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return Pretrained("there", model, names, space)


def begun(pretrained, recipe, names):
    model = make_model(recipe.model)
    notes = initialize_from(model, recipe, pretrained, {"class_names": list(names)})
    return model, notes


def recipe_of(start=None, **settings):
    return Recipe(model=dataclasses.replace(SMALL, **settings), init=start or InitConfig(from_checkpoint="there"))


# Weights


def test_the_same_model_takes_all_weights():
    pretrained = pretrained_of()
    model, notes = begun(pretrained, recipe_of(), "abcd")
    assert notes == ["starting from there"]
    expected = pretrained.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_weights_of_a_narrow_dtype_become_float32():
    pretrained = pretrained_of()
    pretrained = pretrained._replace(model=pretrained.model.to(torch.bfloat16))
    model, _ = begun(pretrained, recipe_of(), "abcd")
    assert model.x_embedder.weight.dtype == torch.float32
    assert torch.equal(model.x_embedder.weight, pretrained.model.x_embedder.weight.float())


def test_what_no_weight_depends_on_may_differ():
    pretrained = pretrained_of(dataclasses.replace(SMALL, router="tc", balance="bias"))
    model, notes = begun(pretrained, recipe_of(router="tc", balance="aux", dropout=0.1, expert_dropout=0.1), "abcd")
    assert notes == ["starting from there"] and "blocks.1.mlp.router.e_score_correction_bias" not in model.state_dict()
    pretrained = pretrained_of(dataclasses.replace(SMALL, router="tc"))
    _, notes = begun(pretrained, recipe_of(router="tc", balance="bias"), "abcd")
    assert notes[1:] == ["newly initialized: blocks.*.mlp.router.e_score_correction_bias"]


CONTRADICTIONS = {
    "width": ({"hidden_size": 64}, "model.hidden_size is 64, but that of there is 32; remove it"),
    "depth": ({"depth": 4}, "model.depth is 4, but that of there is 2"),
    "position": ({"position": "sincos"}, "model.position is sincos, but that of there is rope2d"),
    "prediction": ({"prediction": "x"}, "model.prediction is x, but that of there is velocity"),
    "experts": ({"num_experts": 8}, "model.num_experts is 8, but that of there is 4"),
    "top-k": ({"top_k": 1}, "model.top_k is 1, but that of there is 2"),
    "no classes": ({"num_classes": 0}, "model.num_classes is 0, but there has 4 classes"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_names_both_values(case):
    settings, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message) as caught:
        check_settings("there", SMALL, dataclasses.replace(SMALL, **settings), upcycle=False)
    assert "\n" not in str(caught.value)


def test_experts_of_a_dense_model_need_upcycling():
    dense = dataclasses.replace(SMALL, router="dense")
    with pytest.raises(ValueError, match=r"model.router is dsmoe, but that of there is dense.*init.upcycle makes"):
        check_settings("there", dense, SMALL, upcycle=False)
    check_settings("there", dense, SMALL, upcycle=True)
    with pytest.raises(ValueError, match=r"there already has experts \(router dsmoe\)"):
        check_settings("there", SMALL, SMALL, upcycle=True)
    with pytest.raises(ValueError, match=r"model.hidden_size is 64"):
        check_settings("there", dense, dataclasses.replace(SMALL, hidden_size=64), upcycle=True)


# Classes


def config_of(classes, null=True):
    return dataclasses.replace(SMALL, num_classes=classes, null_class=null)


@pytest.mark.parametrize(
    ("old", "new", "old_names", "new_names", "rows"),
    [
        (4, 4, "abcd", "abcd", [0, 1, 2, 3, 4]),
        (4, 4, "abcd", "dcba", [3, 2, 1, 0, 4]),
        (4, 4, "abcd", "axyb", [0, None, None, 1, 4]),
        (4, 4, "abcd", "wxyz", [0, 1, 2, 3, 4]),
        (4, 4, "", "wxyz", [0, 1, 2, 3, 4]),
        (4, 2, "abcd", "ca", [2, 0, 4]),
        (4, 2, "abcd", "xy", [None, None, 4]),
        (4, 6, "abcd", "abcdef", [0, 1, 2, 3, None, None, 4]),
        (4, 6, "", "abcdef", [None] * 6 + [4]),
    ],
)
def test_rows_go_by_name_and_the_null_class_keeps_its_own(old, new, old_names, new_names, rows):
    assert label_rows(config_of(old), config_of(new), list(old_names), list(new_names)) == rows
    assert label_rows(config_of(old), config_of(new, False), list(old_names), list(new_names)) == rows[:-1]
    assert label_rows(config_of(old, False), config_of(new), list(old_names), list(new_names)) == [*rows[:-1], None]


def test_new_rows_are_the_mean_of_the_old_classes_plus_noise():
    table = torch.randn(4001, 64) + 3
    table[-1] = 1000  # the null class does not count
    new = relabelled(table, [7, None, None, 4000], 4000, seed=0)
    assert torch.equal(new[0], table[7]) and torch.equal(new[3], table[4000])
    noise = new[1:3] - table[:4000].mean(0)
    assert noise.std() == pytest.approx(0.02, rel=0.2) and abs(float(noise.mean())) < 0.006
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(new, relabelled(table, [7, None, None, 4000], 4000, seed=0))
    assert not torch.equal(new[1], relabelled(table, [7, None, None, 4000], 4000, seed=1)[1])


def test_other_classes_are_logged():
    pretrained = pretrained_of()
    model, notes = begun(pretrained, recipe_of(num_classes=3), ["x", "d", "b"])
    assert notes[1].startswith("label table: 2 of 3 rows are kept, by the names of the classes; 1 are new")
    old, new = pretrained.model.y_embedder.weight, model.y_embedder.weight
    assert torch.equal(new[1:], old[[3, 1, 4]])
    assert (new[0] - old[:4].mean(0)).abs().max() < 0.1
    assert begun(pretrained, recipe_of(), "wxyz")[1][1:] == [
        "label table: all 4 rows are kept, by number, because there has no class of an equal name"
    ]
    assert "names no classes" in begun(pretrained._replace(class_names=()), recipe_of(), "wxyz")[1][1]
    without = pretrained_of(dataclasses.replace(SMALL, null_class=False))
    assert begun(without, recipe_of(), "abcd")[1][1:] == ["label table: the row of no class is new"]


def test_an_unconditional_model_can_learn_classes():
    model, notes = begun(pretrained_of(dataclasses.replace(SMALL, num_classes=0), ()), recipe_of(), "abcd")
    assert notes[1:] == ["newly initialized: y_embedder.weight"]
    assert float(model.y_embedder.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_adapters_cannot_learn_new_classes_but_the_table_can():
    start = InitConfig(from_checkpoint="there", lora_rank=2)
    with pytest.raises(ValueError, match="1 classes are new to there, and adapters cannot learn their rows; add y_emb"):
        begun(pretrained_of(), recipe_of(start), ["a", "b", "c", "x"])
    begun(pretrained_of(), recipe_of(start), "dcba")
    start = InitConfig(from_checkpoint="there", lora_rank=2, lora_targets=("attn.qkv", "y_embedder"))
    assert begun(pretrained_of(), recipe_of(start), ["a", "b", "c", "x"])[1][1].startswith("label table: 3 of 4")


def test_other_latents_are_warned_of():
    space = {"vae": "x", "encoder_sha256": "1", "scaling": {"shift": [0.0], "scale": [2.0]}}
    pretrained, data = pretrained_of(space=space), {"class_names": list("abcd"), "latent_space": space | {"vae": "y"}}
    assert initialize_from(make_model(SMALL), recipe_of(), pretrained, data) == ["starting from there"]
    data["latent_space"] = space | {"encoder_sha256": "2"}
    (_, warning) = initialize_from(make_model(SMALL), recipe_of(), pretrained, data)
    assert warning == "warning: the data's latents differ from those of there in encoder_sha256: 2, not 1"


# Positions


def test_the_table_of_positions_is_interpolated():
    """Twice as many positions: the middle of the table is that of the formula at half steps."""
    config = dataclasses.replace(SMALL, position="sincos+rope2d", hidden_size=16, sample_size=32)
    pretrained = pretrained_of(config)
    model, notes = begun(pretrained, Recipe(model=dataclasses.replace(config, sample_size=64)), "abcd")
    assert "model.sample_size is 64 instead of 32: the table of positions is interpolated, rotary" in notes[1]
    halves = torch.arange(32) / 2 - 0.25
    angle = halves[:, None] * 10000.0 ** -(torch.arange(4) / 4)
    inner = model.pos_embed.view(32, 32, 16)[8:24, 8:24]
    # The first half encodes the column, sines before cosines; the fastest waves are smoothed the most.
    for index, values in ((1, angle.sin()[:, 1]), (3, angle.sin()[:, 3]), (5, angle.cos()[:, 1])):
        torch.testing.assert_close(inner[0, :, index], values[8:24], rtol=0, atol=1e-2)
    assert torch.equal(pretrained.model.pos_embed, sincos_table(16, 16, 16))
    same, notes = begun(pretrained, Recipe(model=config), "abcd")
    assert torch.equal(same.pos_embed, pretrained.model.pos_embed) and len(notes) == 1


def test_rotary_positions_resume_with():
    model, notes = begun(pretrained_of(), recipe_of(sample_size=16), "abcd")
    assert notes[1:] == ["model.sample_size is 16 instead of 8: rotary positions continue with the same step"]
    before, after = make_model(SMALL).rotary_cos.view(4, 4, -1), model.rotary_cos.view(8, 8, -1)
    assert torch.equal(after[:4, :4], before)


@pytest.mark.parametrize("settings", [{"position": "rope1d"}, {"sliding_window": 3}])
def test_positions_along_rows_have_one_size(settings):
    old = dataclasses.replace(SMALL, **settings)
    with pytest.raises(ValueError, match="counts tokens along rows of a constant length"):
        check_settings("there", old, dataclasses.replace(old, sample_size=16), upcycle=False)


# Frozen parts


def freezing(*patterns):
    return InitConfig(from_checkpoint="there", freeze=patterns)


def test_patterns_freeze_what_they_match():
    model = freeze_and_add_adapters(make_model(SMALL), freezing("blocks.0.*", "*.experts.w_in", "x_embedder.bias"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if not name.startswith("blocks.0.")} == {
        "blocks.1.mlp.experts.w_in",
        "x_embedder.bias",
    }
    assert {name for name, _ in model.named_parameters() if name.startswith("blocks.0.")} < frozen


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("block.0.*", "blocks.0.*"),
        ("*.atn.*", r"\*.attn"),
        ("y_embeder.weight", "y_embedder.weight"),
        ("blocks.7.mlp.*", "blocks.1.mlp.*"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(pattern, near):
    with pytest.raises(ValueError, match=r"init.freeze has .*, which matches no parameter; did you mean") as e:
        freeze_and_add_adapters(make_model(SMALL), freezing(pattern))
    assert near.replace("\\", "") in str(e.value) and "\n" not in str(e.value)


def test_nothing_left_to_learn_is_refused():
    with pytest.raises(ValueError, match=r"init.freeze is \*, which freezes all parameters"):
        freeze_and_add_adapters(make_model(SMALL), freezing("*"))


def first_batch(recipe):
    from diffusion_moe.data import batches_from

    data = load_dataset(recipe.data, "train")
    return data.__getitems__(next(batches_from(0, 1, len(data), recipe.training.batch_size, recipe.training.seed)))


@pytest.mark.parametrize("router", ["dsmoe", "diffmoe"])
def test_frozen_parts_and_the_state_of_frozen_routers_stay(tiny, router):
    options = ["--init.from_checkpoint=there", '--init.freeze=["blocks.1.mlp.router.*", "*.attn.*"]', "--model.depth=4"]
    recipe = read_recipe("digits", [*tiny, *options, f"--model.router={router}"])
    state, batch = make_state(recipe, CPU), first_batch(recipe)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    for _ in range(4):
        train_step(state, recipe, batch)
    same = {name for name, tensor in state.model.state_dict().items() if torch.equal(tensor, before[name])}
    wanted = {name for name in before if ".attn." in name or name.startswith("blocks.1.mlp.router.")}
    assert wanted <= same and not any(name.startswith("blocks.3.mlp.router") for name in same)
    ema = dict(state.ema.named_parameters())
    for name, parameter in state.model.named_parameters():  # one copy in memory
        assert (ema[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad)


def test_emas_share_what_is_frozen():
    model, ema = (freeze_and_add_adapters(make_model(SMALL), freezing("blocks.*")) for _ in range(2))
    share_frozen(model, [ema])
    assert ema.blocks[0].attn.qkv.weight.data_ptr() == model.blocks[0].attn.qkv.weight.data_ptr()
    assert ema.x_embedder.weight.data_ptr() != model.x_embedder.weight.data_ptr()


# Runs


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_options):
    """A finished run of digits, and what reads it."""
    folder = tmp_path_factory.mktemp("base") / "run"
    options = [*tiny_options, "--training.steps=60", "--training.ema_decay=0.9", "--optimizer.learning_rate=3e-3"]
    train(read_recipe("digits", options), folder, log=lambda line: None)
    return folder


def reading(folder):
    def pretrained():
        return Pretrained(str(folder), load_model(folder / "model"), tuple(map(str, range(10))))

    return pretrained


def tuned(tiny, folder, base, *options, steps=8, pretrained=True):
    """Train on from the base; returns the lines it says."""
    lines = []
    given = [*tiny, "--optimizer.schedule=constant", f"--training.steps={steps}", "--training.checkpoint_every=4"]
    recipe = read_recipe("digits", [*given, f"--init.from_checkpoint={base}", "--training.ema_decay=0.9", *options])
    train(recipe, folder, log=lines.append, pretrained=reading(base) if pretrained else None)
    return lines


def weights(folder):
    return load_file(folder / "model" / "diffusion_pytorch_model.safetensors")


LORA = {
    "freeze": ['--init.freeze=["blocks.0.*", "*.experts.*"]'],
    "lora": ["--init.lora_rank=2", "--init.lora_targets=[attn.qkv,attn.proj,y_embedder,mlp.experts.w_in]"],
}


@pytest.mark.parametrize("kind", LORA)
def test_a_run_resumes_bit_for_bit_and_without_its_source(tiny, tmp_path, base, kind):
    lines = tuned(tiny, tmp_path / "whole", base, *LORA[kind])
    assert lines[0] == f"starting from {base}"
    tuned(tiny, tmp_path / "parts", base, *LORA[kind], steps=4)
    lines = tuned(tiny, tmp_path / "parts", base, *LORA[kind], pretrained=False)
    assert any("resuming from" in line for line in lines) and not any("starting from" in line for line in lines)
    one, other = (load_file(next(tmp_path.glob(f"{n}/checkpoints/*08/*.safetensors"))) for n in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_holds_frozen_parameters_once(tiny, tmp_path, base):
    tuned(tiny, tmp_path, base, "--init.lora_rank=2")
    saved = load_file(next(tmp_path.glob("checkpoints/*08/*.safetensors")))
    assert "model.blocks.0.attn.qkv.base_layer.weight" in saved
    learned = {name.removeprefix("ema.") for name in saved if name.startswith("ema.")}
    assert all("lora_" in name or "e_score_correction_bias" in name for name in learned) and len(learned) == 4 * 2 + 1
    moments = {name for name in saved if name.startswith("optimizer.")}
    assert len(moments) == 3 * 8 and all("lora_" in name for name in moments)


def test_adapters_of_a_run_give_its_model_and_leave_the_base(tiny, tmp_path, base):
    """The base with the adapter is the merged model: nothing else has moved, no routing state either."""
    options = ["--init.lora_rank=2", "--init.lora_alpha=4", "--optimizer.learning_rate=1e-2"]
    tuned(tiny, tmp_path, base, *options, steps=12)
    before, after = weights(base), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"blocks.{i}.attn.{name}.weight" for i in range(2) for name in ("qkv", "proj")}
    for name in changed:
        ranks = torch.linalg.svdvals(after[name] - before[name])
        assert ranks[2] < 1e-4 * ranks[0]
    model = DiT.from_pretrained(base / "model")
    model.load_lora_adapter(tmp_path / "lora", prefix=None, use_safetensors=True)
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([3, 10])
    with torch.no_grad():
        expected = load_model(tmp_path / "model")(x, t, y).sample
        torch.testing.assert_close(model.eval()(x, t, y).sample, expected, rtol=1e-4, atol=1e-5)
        assert (load_model(base / "model")(x, t, y).sample - expected).abs().max() > 1e-3


def test_an_adapter_ema_is_the_mean_of_adapters_over_steps(tiny, tmp_path, base):
    """ema = 0.9 ema + 0.1 adapter: after the first step a tenth of it."""
    tuned(tiny, tmp_path, base, "--init.lora_rank=2", "--training.checkpoint_every=1", steps=1)
    saved = load_file(next(tmp_path.glob("checkpoints/*01/*.safetensors")))
    b = "blocks.1.attn.qkv.lora_B.default.weight"
    assert saved[f"model.{b}"].abs().max() == pytest.approx(2e-3, rel=1e-3)
    torch.testing.assert_close(saved[f"ema.{b}"], 0.1 * saved[f"model.{b}"])
    model = load_model(base / "model")
    load_lora(model, tmp_path / "lora")
    assert torch.equal(model.state_dict()[b], saved[f"ema.{b}"])


def test_a_changed_start_is_refused_on_resuming(tiny, tmp_path, base):
    tuned(tiny, tmp_path, base, steps=4)
    with pytest.raises(ValueError, match=r"init.lora_rank: None -> 2"):
        tuned(tiny, tmp_path, base, "--init.lora_rank=2")
    with pytest.raises(ValueError, match=r"init.from_checkpoint: .* -> elsewhere"):
        tuned(tiny, tmp_path, base, "--init.from_checkpoint=elsewhere")


def test_a_source_without_a_reader_is_refused(tiny, tmp_path, base):
    with pytest.raises(ValueError, match="pass `pretrained`"):
        tuned(tiny, tmp_path / "run", base, pretrained=False)
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_back_to_its_beginning_starts_from_the_source_again(tiny, tmp_path, base):
    """Without any checkpoint a spoiled run goes back to step 0, which is not a random model."""
    recipe = read_recipe("digits", [*tiny, f"--init.from_checkpoint={base}", "--training.max_nonfinite_steps=0"])
    from diffusion_moe.run_folder import RunFolder
    from diffusion_moe.training.loop import Trainer

    trainer = Trainer(recipe, RunFolder(tmp_path / "run"), "auto", lambda line: None, None, reading(base))
    with torch.no_grad():
        trainer.state.model.x_embedder.weight.fill_(torch.nan)
    again = trainer.fresh_state()
    assert torch.equal(again.model.x_embedder.weight, load_model(base / "model").x_embedder.weight)


@pytest.fixture(scope="module")
def five_digits(tmp_path_factory):
    """A folder of images of five of the ten digits."""
    from diffusion_moe.config import DataConfig

    folder = tmp_path_factory.mktemp("images")
    data = load_dataset(DataConfig(), "train").read_all()
    for digit in range(5):
        (folder / str(digit)).mkdir()
        for i, image in enumerate(data.images[data.labels == digit][:20]):
            pixels = ((image[0] + 1) * 127.5).round().byte().numpy()
            Image.fromarray(pixels.astype(np.uint8)).save(folder / str(digit) / f"{i}.png")
    return folder


def test_fine_tuning_to_five_of_ten_classes(tiny, tmp_path, base, five_digits):
    """It begins with a lower loss than a fresh model ends with, and ends as a model of five classes."""
    options = ["--data.kind=folder", f"--data.path={five_digits}", "--model.num_classes=5", "--logging.every=1"]
    lines = tuned(tiny, tmp_path / "tuned", base, *options, steps=10)
    assert lines[1].startswith("label table: 5 of 5 rows are kept, by the names of the classes; 0 are new")
    fresh = read_recipe("digits", [*tiny, *options, "--training.steps=10"])
    train(fresh, tmp_path / "fresh", log=lambda line: None)
    losses = {
        name: [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("tuned", "fresh")
    }
    assert losses["tuned"][0] < losses["fresh"][-1]
    model = load_model(tmp_path / "tuned" / "model")
    assert model.settings.num_classes == 5 and model.y_embedder.weight.shape == (6, 32)


def test_upcycling_a_dense_run_beats_starting_from_scratch(tiny, tmp_path):
    """Five steps of MoE layers made of a dense run, against five of a fresh one."""
    dense = [*tiny, "--model.router=dense", "--model.mlp_activation=swiglu", "--model.mlp_dim=48"]
    dense += ["--model.mlp_bias=false", "--training.steps=60", "--training.ema_decay=0.9"]
    train(read_recipe("digits", [*dense, "--optimizer.learning_rate=3e-3"]), tmp_path / "dense", log=lambda line: None)
    mixture = ["--model.mlp_activation=swiglu", "--model.mlp_dim=48", "--model.mlp_bias=false", "--logging.every=1"]
    lines = tuned(tiny, tmp_path / "mixture", tmp_path / "dense", "--init.upcycle=true", *mixture, steps=5)
    assert lines[1] == (
        "experts of 1 blocks: the shared expert takes 16 of 48 hidden units, the routed ones are 2 copies of the "
        "other units in 2 slices each; they start exactly equal to the dense layers, and their routers are new"
    )
    train(read_recipe("digits", [*tiny, *mixture, "--training.steps=5"]), tmp_path / "fresh", log=lambda line: None)
    rows = {
        name: [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("mixture", "fresh")
    }
    assert max(rows["mixture"]) < 0.9 * min(rows["fresh"])


def test_adapters_of_experts_neither_compile_nor_shard(tiny):
    start = ["--init.from_checkpoint=there", "--init.lora_rank=2", "--init.lora_targets=[mlp.experts.w_in]"]
    with pytest.raises(ValueError, match=r"cannot be compiled; set training.compile to false"):
        check_adapters(read_recipe("digits", [*tiny, *start, "--training.compile=true"]), world=1)
    with pytest.raises(ValueError, match="train on one process, and there are 2"):
        check_adapters(read_recipe("digits", [*tiny, *start]), world=2)


WRONG = {
    "no source": (["--init.lora_rank=2"], "init.lora_rank is 2, but init.from_checkpoint is missing"),
    "rank": (["--init.from_checkpoint=x", "--init.lora_rank=0"], "init.lora_rank is 0; it must be positive"),
    "alpha": (["--init.from_checkpoint=x", "--init.lora_rank=2", "--init.lora_alpha=0"], "init.lora_alpha is 0"),
    "alpha alone": (["--init.from_checkpoint=x", "--init.lora_alpha=2"], "init.lora_alpha is 2.0, but init.lora_rank"),
    "no targets": (["--init.from_checkpoint=x", "--init.lora_rank=2", "--init.lora_targets=[]"], "are empty"),
    "both": (["--init.from_checkpoint=x", "--init.lora_rank=2", '--init.freeze=["*"]'], "remove it"),
    "adapters of new experts": (["--init.from_checkpoint=x", "--init.lora_rank=2", "--init.upcycle"], "new routers"),
    "noise": (["--init.from_checkpoint=x", "--init.upcycle_noise=0.1"], "init.upcycle is false"),
    "negative noise": (["--init.from_checkpoint=x", "--init.upcycle_noise=-1"], "use 0 for none"),
    "dense": (["--init.from_checkpoint=x", "--init.upcycle", "--model.router=dense"], "model.router is dense; choose"),
    "weights": (["--init.from_checkpoint=x", "--init.weights=best"], "expected one of ema, ema2, model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_start_is_one_line(case):
    options, message = WRONG[case]
    with pytest.raises(ValueError) as caught:
        read_recipe("digits", options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
