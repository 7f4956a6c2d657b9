"""Vision models of `transformers` as extractors, on small random ones."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_moe.benchmarks.wait_trace import StandIn
from diffusion_moe.evaluation.scorer import make_extractor
from diffusion_moe.evaluation.vision import VisionModel, resize

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "dinov2-tiny"
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    settings = {"crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.25]}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(settings | {"image_processor_type": "BitImageProcessor"})
    )
    return folder


def test_dinov2_gives_its_normalised_class_token(dinov2):
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    extractor = make_extractor(str(dinov2))
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.2, 0.25]).view(3, 1, 1)
    with torch.no_grad():
        model = transformers.Dinov2Model.from_pretrained(dinov2).eval()
        expected = model(pixel_values=(images / 255 - mean) / std).pooler_output
    torch.testing.assert_close(extractor(images)["pool"], expected)
    assert extractor.identity.feature == "class token"
    assert extractor.identity.resize == "bicubic antialiased to 28, normalised by 0.5,0.4,0.3,0.2,0.2,0.25"
    assert expected.std() > 0.01


def test_networks_without_class_token_give_the_mean_over_places(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetModel(config).eval().save_pretrained(tmp_path / "resnet")
    extractor = VisionModel(str(tmp_path / "resnet"))
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        model = transformers.ResNetModel.from_pretrained(tmp_path / "resnet").eval()
        expected = model(pixel_values=(images / 255 - mean) / std).last_hidden_state.mean((2, 3))
    torch.testing.assert_close(extractor(images)["pool"], expected)
    assert extractor.identity.feature == "mean over places"


@pytest.mark.parametrize("size", [20, 50])
def test_resizing_equals_pillows_on_float_planes(size):
    images = torch.randint(0, 256, (1, 2, 33, 41), dtype=torch.uint8)
    for plane, found in zip(images[0].float().numpy(), resize(images, size)[0]):
        pillows = Image.fromarray(plane, mode="F").resize((size, size), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(found, np.array(pillows), atol=1e-3)


def test_equal_weights_are_one_extractor_and_others_are_not(dinov2, tmp_path):
    one, again = VisionModel(str(dinov2)), VisionModel(str(dinov2))
    one.identity.check(again.identity, "x")
    torch.manual_seed(1)
    config = transformers.Dinov2Config.from_pretrained(dinov2)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"ref.npz was made by .*other with weights .* use one extractor for both"):
        one.identity.check(VisionModel(str(tmp_path / "other")).identity, "ref.npz")
    shutil.copytree(dinov2, tmp_path / "larger")
    (tmp_path / "larger" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"with resizing bicubic antialiased to 42, normalised by 0.485"):
        one.identity.check(VisionModel(str(tmp_path / "larger")).identity, "ref.npz")


def test_what_is_no_vision_model_is_one_line(tmp_path):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a BertModel, which reads no images"):
        VisionModel(str(tmp_path / "bert"))
    with pytest.raises(ValueError, match=r"cannot load the extractor .*nothing: .*give inception, classifier") as error:
        VisionModel(str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


def test_a_pass_on_a_device_mixes_it_with_nothing_on_the_host(dinov2):
    """Traced on the stand-in for a GPU, where nothing waits but the copy of the features."""
    extractor = make_extractor(str(dinov2)).to(torch.device("meta"))
    with StandIn().trace() as waits:
        features = extractor(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))
    assert features["pool"].device.type == "cpu" and features["pool"].shape == (2, 24)
    assert [wait.kind for wait in waits] == ["copy to the host"]
    extractor.module.layernorm.bias = torch.nn.Parameter(torch.zeros(24))
    with pytest.raises(RuntimeError, match="a tensor on the CPU of shape"), StandIn().trace():
        extractor(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))
