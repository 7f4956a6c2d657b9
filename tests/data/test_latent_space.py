"""Latents scaled for a model, and back."""

from dataclasses import asdict

import pytest
import torch
from diffusers import AutoencoderKL

from diffusion_moe.data.latent_space import LatentScaling, LatentSpace, encoder_sha256


def make_vae(**options):
    torch.manual_seed(options.pop("seed", 0))
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, sample_size=8, **options)


CONFIGS = {
    "factor": ({"scaling_factor": 0.5}, [3.0, 4.0], [1.5, 2.0]),
    "factor and shift": ({"scaling_factor": 0.5, "shift_factor": 1.0}, [3.0, 4.0], [1.0, 1.5]),
    "channels": (
        {"scaling_factor": 0.5, "latents_mean": [1.0, -2.0], "latents_std": [4.0, 0.25]},
        [3.0, 4.0],
        [0.25, 12.0],
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_vae_s_config_says_how_its_latents_are_scaled(case):
    config, latent, seen = CONFIGS[case]
    scaling = LatentScaling.of_vae(make_vae(**config).config)
    latents = torch.tensor(latent)[None, :, None, None].expand(3, 2, 5, 5)
    expected = torch.tensor(seen)[None, :, None, None].expand(3, 2, 5, 5)
    torch.testing.assert_close(scaling.scaled(latents), expected)
    torch.testing.assert_close(scaling.unscaled(expected), latents)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_claimed_vae_carries_the_scaling_into_its_folder(case, tmp_path):
    scaling = LatentScaling.of_vae(CONFIGS[case][0])
    vae = make_vae(scaling_factor=7.0, shift_factor=3.0)
    LatentSpace("own", encoder_sha256(vae), scaling).claim(vae, "own")
    vae.save_pretrained(tmp_path)
    found = LatentScaling.of_vae(AutoencoderKL.from_pretrained(tmp_path).config)
    assert found.shift == pytest.approx(scaling.shift)
    assert found.scale == pytest.approx(scaling.scale)


def test_the_encoder_alone_decides_which_space_it_is():
    vae, other_decoder, other = make_vae(), make_vae(), make_vae(seed=1)
    with torch.no_grad():
        other_decoder.decoder.conv_in.weight.add_(1)
    space = LatentSpace("first", encoder_sha256(vae), LatentScaling((0.0,), (0.5,)))
    space.claim(other_decoder, "second")
    with pytest.raises(ValueError, match="the VAE third has another encoder than first"):
        space.claim(other, "third")


def test_a_space_survives_json():
    import json

    space = LatentSpace("name", "abc", LatentScaling((0.1, -0.2), (1 / 3, 7.0)))
    assert LatentSpace.from_dict(json.loads(json.dumps(asdict(space)))) == space


def test_a_scaling_that_cannot_be_undone_is_refused():
    with pytest.raises(ValueError, match="no scale of 0"):
        LatentScaling((0.0,), (0.0,))
