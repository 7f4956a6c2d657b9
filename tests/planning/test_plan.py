"""A plan's numbers are those of the thing itself: its tensors, its graph, its products, its files."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from activation_trace import blank_inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from diffusion_moe.cli import main
from diffusion_moe.config import read_recipe
from diffusion_moe.models import make_model
from diffusion_moe.planning.memory import Tensors, received_bytes
from diffusion_moe.planning.options import PlanOptions
from diffusion_moe.planning.plan import ROOM, compute_of, layouts_of, make_plan
from diffusion_moe.planning.table import duration
from diffusion_moe.run_folder import RunFolder
from diffusion_moe.training.checkpoint import state_tensors
from diffusion_moe.training.parallelize import make_meshes
from diffusion_moe.training.state import make_state

CPU = torch.device("cpu")
TEXT = ["--model.num_classes=0", "--model.text_dim=12", "--model.text_length=5"]
MODELS = {
    "dsmoe": ["--model.router=dsmoe"],
    "diffmoe": ["--model.router=diffmoe", "--model.expert_bias=true"],
    "race": ["--model.router=race"],
    "dense": ["--model.router=dense"],
    "jit": [
        *("--model.backbone=jit", "--model.prediction=x", "--model.bottleneck_dim=6"),
        *("--model.class_tokens=2", "--model.class_tokens_from=1"),
    ],
    "ddpm": ["--model.process=ddpm", "--model.prediction=epsilon", "--model.learn_sigma=true"],
    "text": TEXT,
    "text, one sequence": [*TEXT, "--model.text_conditioning=joint"],
    "text, pooled": [*TEXT, "--model.text_pooled_dim=6", "--model.text_null=empty"],
}


@pytest.fixture(params=MODELS)
def options(request, tiny):
    return [*tiny, *MODELS[request.param]]


@pytest.fixture
def fake_processes():
    """Plays one of many processes whose neighbours do nothing."""

    def start(world):
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def local(tensors):
    """What this process holds of them, every memory once."""
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return {part.data_ptr(): part.nbytes for part in parts if part.numel()}


def parts_of(state):
    """Bytes that a process really holds of a state, after a gradient of every weight that learns."""
    model = local([*state.model.parameters(), *state.model.buffers()])
    averages = local(tensor for ema in state.emas for tensor in (*ema.parameters(), *ema.buffers()))
    return {
        "weights": sum(model.values()),
        "gradients": sum(local(p for p in state.model.parameters() if p.requires_grad).values()),
        "optimizer": sum(local(state.optimizer.named_moments().values()).values()),
        "averages": sum(size for place, size in averages.items() if place not in model),
    }


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--training.extra_ema_decays=[0.9]"],
        ["--optimizer.kind=muon", "--training.posthoc_ema_stds=[0.1]"],
        ["--init.from_checkpoint=another", "--init.freeze=[blocks.0.*]"],
        ["--init.from_checkpoint=another", "--init.lora_rank=2", "--init.lora_targets=[attn.qkv,adaln.1]"],
    ],
)
def test_the_state_takes_what_its_tensors_take(options, more):
    recipe = read_recipe("digits", [*options, *more])
    if recipe.model.text_null == "empty":
        pytest.skip("its null prompt comes with the data")
    planned = dataclasses.asdict(Tensors(recipe).memory(recipe.parallel, activations=0))
    real = parts_of(make_state(recipe, CPU))
    assert {name: planned[name] for name in real} == real
    assert planned["gathered"] == 0


def test_adapters_of_experts_and_a_label_table_take_what_they_take(tiny):
    lora = "--init.lora_targets=[attn.proj,mlp.experts.w_in,mlp.experts.w_out,y_embedder]"
    recipe = read_recipe("digits", [*tiny, "--init.from_checkpoint=another", "--init.lora_rank=2", lora])
    planned, state = Tensors(recipe), make_state(recipe, CPU)
    real = parts_of(state)
    memory = dataclasses.asdict(planned.memory(recipe.parallel, activations=0))
    assert {name: memory[name] for name in real} == real
    assert planned.checkpoint == sum(tensor.nbytes for tensor in state_tensors(state).values())


@pytest.mark.parametrize("spread", ["replicate=4", "shard=4", "experts=4", "shard=2 experts=2", "replicate=2 shard=2"])
def test_a_process_of_many_holds_its_part(spread, tiny, fake_processes):
    recipe = read_recipe("digits", [*tiny, *(f"--parallel.{part}" for part in spread.split())])
    planned = dataclasses.asdict(Tensors(recipe).memory(recipe.parallel, activations=0))
    fake_processes(4)
    real = parts_of(make_state(recipe, CPU, make_meshes(recipe.parallel, CPU)))
    if spread == "replicate=4":
        assert planned["weights"] == real["weights"] > planned["gradients"] == real["gradients"]
    for name, size in real.items():  # FSDP2 rounds parts up in a buffer of its own
        assert size <= planned[name] <= 1.05 * size, name
    assert planned["gathered"] > 0


def test_rows_received_from_other_processes(tiny):
    recipe = read_recipe("digits", [*tiny, "--training.precision=bf16"])
    rows = 3 * 16 * recipe.model.top_k
    assert received_bytes(recipe, 3) == rows * (2 * 32 + 28)


def test_the_products_are_those_of_the_forward_pass(options):
    recipe = read_recipe("digits", options)
    model, batch = make_model(recipe.model).train(), recipe.training.batch_size
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*blank_inputs(recipe.model, batch))
    compute = compute_of(recipe)
    assert compute.forward == counter.get_total_flops()
    assert (compute.backward, compute.model, compute.recompute) == (2 * compute.forward, 3 * compute.forward, 0)


def test_what_is_made_again_is_counted(tiny):
    experts = compute_of(read_recipe("digits", [*tiny, "--training.recompute=experts"]))
    assert experts.recompute == 16 * 2 * (16 * 2) * 32 * (2 * 16)  # images, multiply and add, rows, D, columns
    blocks = compute_of(read_recipe("digits", [*tiny, "--training.recompute=blocks"]))
    assert experts.recompute < blocks.recompute < blocks.forward == experts.forward


def test_files_are_as_large_as_planned(tiny, tmp_path):
    options = [*tiny, "--training.steps=2", "--training.extra_ema_decays=[0.9]"]
    options += ["--training.posthoc_ema_stds=[0.05,0.1]", "--training.posthoc_ema_every=1"]
    plan = make_plan(read_recipe("digits", options), PlanOptions())
    assert main(["train", "digits", *options, f"--output_dir={tmp_path}"]) == 0
    run = RunFolder(tmp_path)
    tensors = sum(tensors_in(path) for path in (run.checkpoints / "step-00000002").glob("*.safetensors"))
    assert tensors == plan.tensors.checkpoint
    assert sum(tensors_in(path) for path in run.snapshots.glob("*/*.safetensors")) == plan.tensors.snapshots
    for folder in (run.model, run.ema_model(0.9)):
        assert sum(tensors_in(path) for path in folder.glob("*.safetensors")) == plan.tensors.published


def tensors_in(path):
    """Bytes of a safetensors file behind its header."""
    header = int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - 8 - header


def test_time_is_the_products_over_the_speed(tiny):
    recipe = read_recipe("digits", [*tiny, "--training.steps=1000"])
    plan = make_plan(recipe, PlanOptions(world=4, peak_tflops=2.0, utilisation=0.25))
    assert plan.seconds == pytest.approx(1000 * plan.compute.model / (4 * 2e12 * 0.25))
    record = plan.record()
    assert record["images"] == 16_000 and record["tokens"] == 256_000 and record["images_per_process"] == 4
    assert record["images_per_second"] == pytest.approx(16_000 / plan.seconds)


def test_layouts_are_all_that_can_be_and_the_first_that_fits_is_chosen(tiny):
    recipe = read_recipe("digits", tiny)
    layouts = [(p.replicate, p.shard, p.experts) for p in layouts_of(recipe, 8)]
    assert sorted(layouts) == sorted((r, s, e) for e in (1, 2, 4) for s in (1, 2, 4, 8) for r in (8 // e // s,) if r)
    assert layouts[0] == (8, 1, 1)  # 8 is no number of parts for 4 experts
    roomy = make_plan(recipe, PlanOptions(world=8))
    assert roomy.chosen is roomy.layouts[0] and all(layout.fits for layout in roomy.layouts)
    sizes = [layout.memory.total for layout in roomy.layouts]
    narrow = make_plan(recipe, PlanOptions(world=8, memory_gb=min(sizes) / ROOM / 1e9))
    assert [layout.fits for layout in narrow.layouts] == [size <= min(sizes) for size in sizes]
    assert narrow.chosen.memory.total == min(sizes)
    tight = make_plan(recipe, PlanOptions(world=8, memory_gb=1e-9))
    assert not tight.chosen.fits and tight.chosen.memory.total == min(sizes)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--parallel.shard=2", "--world=8"], "1 x 2 x 1 = 2, but --world is 8"),
        (["--world=3"], "training.batch_size"),
        (["--world=0"], "world is 0"),
        (["--utilisation=1.5"], "utilisation is 1.5"),
    ],
)
def test_mistakes_are_one_line(more, said, tiny, capsys):
    assert main(["plan", "digits", *tiny, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_command_prints_tables_or_json(tiny, capsys):
    assert main(["plan", "digits", *tiny, "--world=2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    plan = make_plan(read_recipe("digits", tiny), PlanOptions(world=2))
    assert record == json.loads(json.dumps(plan.record()))
    assert main(["plan", "digits", *tiny, "--world=2"]) == 0
    text = capsys.readouterr().out
    assert f"{plan.size.total:,}" in text and "suggested" in text and "images/s" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (61, "1 min 1 s"), (3 * 3600 + 120, "3 h 2 min"), (2 * 86400 + 3600, "2 days 1 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_every_shipped_recipe_can_be_planned(capsys):
    for name in ("dsmoe-3b-e16", "diffmoe-l-e8-ddpm", "jitmoe-b-16-e16", "t2i-dsmoe-s-e16"):
        assert main(["plan", name, "--world=16", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["chosen"]["fits"]
