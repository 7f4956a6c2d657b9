"""A tiny VAE and a few pictures."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

SIZE, CLASSES, EACH = 16, ("ant", "bee"), 7


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """An AutoencoderKL that halves sides and gives 4 channels, with a scaling and a shift."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Fourteen pictures of noise in two classes, larger than they are encoded."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    for c, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(EACH):
            pixels = np.random.RandomState(10 * c + i).randint(0, 255, (24, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def broken_pictures(tmp_path, pictures):
    """The same with two files that cannot be read: ant/3.png and bee/0.png."""
    import shutil

    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures" / "ant" / "3.png").write_bytes(b"broken")
    (tmp_path / "pictures" / "bee" / "0.png").write_bytes(b"")
    return tmp_path / "pictures"
