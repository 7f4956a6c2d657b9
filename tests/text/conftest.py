"""A folder of captioned pictures: squares of one colour, which their captions name."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="session")
def captioned_folder(tmp_path_factory):
    """24 pictures with two captions each."""
    folder = tmp_path_factory.mktemp("captioned") / "pictures"
    folder.mkdir()
    lines = []
    for i in range(24):
        name = list(COLOURS)[i % 3]
        Image.fromarray(np.full((10, 8, 3), COLOURS[name], dtype=np.uint8)).save(folder / f"{i:02d}.png")
        lines.append({"file_name": f"{i:02d}.png", "text": [f"a {name} square", f"a photo of a large {name} square"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


TINY_T2I = [
    "--model.sample_size=8",
    "--model.in_channels=3",
    "--model.num_classes=0",
    "--model.text_dim=16",
    "--model.text_length=12",
    "--data.kind=folder",
    "--data.caption_column=text",
    "--data.text_length=12",
    "--data.image_size=8",
    "--data.channels=3",
    "--training.device=cpu",
    "--optimizer.schedule=constant",
]


@pytest.fixture(scope="session")
def tiny_t2i(tiny_options, captioned_folder, text_encoder_folder):
    """Options that make the digits recipe a tiny text-to-image one on the captioned folder."""
    paths = [f"--data.path={captioned_folder}", f"--data.text_encoder={text_encoder_folder}"]
    return [*tiny_options, *TINY_T2I, *paths]


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """An AutoencoderKL that halves sides."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, sample_size=8)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder
