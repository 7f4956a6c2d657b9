"""diffusers loads what we saved, in a fresh process, whichever of the two was imported first."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils
from torch import nn

from diffusion_moe import ClassToImagePipeline, DiT, JiT, default_scheduler
from diffusion_moe.pipelines.registration import register

SMALL = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_classes": 3, "hidden_size": 32, "depth": 2,
         "num_heads": 2, "num_experts": 4, "expert_dim": 16}  # fmt: skip
DRAW = """
import sys, torch
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
images = pipe(["one", 2], num_inference_steps=3, guidance_scale=2.0, output_type="pt",
              generator=torch.Generator().manual_seed(0)).images
torch.save([type(pipe).__module__, type(pipe).__name__, type(pipe.transformer).__name__, images], sys.argv[2])
"""


def make_pipe(kind=DiT, **settings):
    torch.manual_seed(0)
    model = kind(**{**SMALL, **settings}).eval()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    vae = None
    if model.settings.in_channels == 4:
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        vae = AutoencoderKL(**blocks, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4).eval()
    scheduler = default_scheduler(model.settings)
    pipe = ClassToImagePipeline(model, scheduler, vae, id2label={0: "zero", 1: "one, single", 2: "two"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt", "generator": generator}
    return pipe(["one", 2], **options).images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A latent pipeline with its vae, in a folder, and its images."""
    folder, pipe = tmp_path_factory.mktemp("pipeline"), make_pipe()
    pipe.save_pretrained(folder)
    return folder, images(pipe)


OURS_FIRST = """
import importlib, sys
import diffusion_moe
importlib.reload(diffusion_moe)
assert not {"torch", "diffusers"} & set(sys.modules), "registering waits"
from diffusion_moe import DiT
model = DiT(sample_size=8, in_channels=1, hidden_size=32, depth=2, num_heads=4, expert_dim=8)
assert not hasattr(model, "_nothing"), "a name that copying and pickling ask for"
assert "diffusers" not in sys.modules
model.save_pretrained
assert "diffusers" in sys.modules, "asking for a name of diffusers loads it"
import diffusers
assert isinstance(model, diffusers.ModelMixin) and isinstance(model, diffusers.ConfigMixin)
assert model.config.depth == 2
diffusers.DiffusionPipeline
assert "diffusion_moe.pipelines.class_to_image" not in sys.modules, "registering loads nothing"
assert diffusers.ClassToImagePipeline is diffusion_moe.ClassToImagePipeline
"""
THEIRS_FIRST = "import diffusers; diffusers.DiffusionPipeline; import diffusion_moe"


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(OURS_FIRST, id="ours first"),
        pytest.param(THEIRS_FIRST, id="theirs first", marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_registers_us_and_samples_the_same_bits(saved, imports, tmp_path):
    folder, expected = saved
    command = [sys.executable, "-c", f"{imports}\n{DRAW}", folder, tmp_path / "out.pt"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    module, pipeline, transformer, actual = torch.load(tmp_path / "out.pt")
    assert (module, pipeline, transformer) == ("diffusion_moe", "ClassToImagePipeline", "DiT")
    assert expected.std() > 0.01 and torch.equal(actual, expected)


def test_the_saved_folder_names_us(saved):
    index = json.loads((saved[0] / "model_index.json").read_text())
    assert index["_class_name"] == "ClassToImagePipeline"
    assert index["transformer"] == ["diffusion_moe", "DiT"] and index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert index["id2label"] == {"0": "zero", "1": "one, single", "2": "two"}


def test_from_the_hub_our_components_are_no_unknown_code(saved):
    """What from_pretrained asks before it downloads a repository."""
    index = json.loads((saved[0] / "model_index.json").read_text())
    ask = pipeline_loading_utils._get_custom_components_and_folders
    custom, folders = ask("someone/model", index, filenames=["model_index.json"])
    assert custom == {} and set(folders) == {"transformer", "scheduler", "vae"}


def test_registering_again_changes_nothing():
    import diffusers

    before = type(diffusers)
    register()
    assert type(diffusers) is before and diffusers.ClassToImagePipeline is ClassToImagePipeline
    assert diffusers.DiTPipeline.__name__ == "DiTPipeline"


def test_components_may_be_given_when_loading(saved):
    model = make_pipe().transformer
    pipe = ClassToImagePipeline.from_pretrained(saved[0], transformer=model, vae=None)
    assert pipe.transformer is model and pipe.vae is None
    with pytest.raises(ValueError, match="DDIMScheduler does not fit"):
        DiffusionPipeline.from_pretrained(saved[0], scheduler=DDIMScheduler())


def test_a_pixel_pipeline_with_jit_comes_back_without_a_vae(tmp_path):
    pipe = make_pipe(JiT, in_channels=3, prediction="x", bottleneck_dim=8, class_tokens=2)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is JiT and loaded.vae is None and loaded.labels == pipe.labels
    assert torch.equal(images(loaded), images(pipe))


def test_variant_and_dtype(tmp_path):
    pipe = make_pipe(top_k=4)
    pipe.save_pretrained(tmp_path, variant="ema")
    assert (tmp_path / "transformer/diffusion_pytorch_model.ema.safetensors").exists()
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="ema")
    assert torch.equal(images(loaded), images(pipe))
    half = DiffusionPipeline.from_pretrained(tmp_path, variant="ema", torch_dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in half.transformer.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if ".router." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".router." not in name} == {torch.bfloat16}
    assert half.vae.dtype == torch.bfloat16
    assert (images(half).float() - images(pipe)).abs().mean() < 0.01
