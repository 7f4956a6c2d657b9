"""Features are computed in float32, whatever rounding the process allows."""

import pytest
import torch
from torch import nn

from diffusion_moe.evaluation.features import Extractor, ExtractorIdentity

MATMUL, CONVOLUTION = torch.backends.cuda.matmul, torch.backends.cudnn.conv


class Recorder(Extractor):
    """Notes what is allowed while features are computed."""

    identity = ExtractorIdentity("recorder", "none", "none", "none")
    channels = 1

    def __init__(self):
        self.module, self.seen = nn.Linear(1, 1), []

    def extract(self, images):
        self.seen.append((MATMUL.fp32_precision, CONVOLUTION.fp32_precision))
        return {"pool": images.flatten(1).float()}


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.backends.fp32_precision = MATMUL.fp32_precision = "none"


@pytest.mark.parametrize("switch", [torch.backends, MATMUL], ids=["everything", "matmuls"])
def test_matmuls_and_convolutions_do_not_round(switch):
    switch.fp32_precision = "tf32"
    before, extractor = (MATMUL.fp32_precision, CONVOLUTION.fp32_precision), Recorder()
    assert before == ("tf32", "tf32")
    extractor(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    assert extractor.seen == [("ieee", "ieee")]
    assert (MATMUL.fp32_precision, CONVOLUTION.fp32_precision) == before
