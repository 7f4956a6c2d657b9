"""Text encoders: features, masks, cuts, identity, and what is refused."""

import json
from dataclasses import asdict

import pytest
import torch

from diffusion_moe.text import TextFeatures, TextSpace, load_encoder

KINDS = ["t5", "clip", "bert"]
PROMPTS = ["a red circle", "a small dark square of the left image", ""]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, make_text_encoder):
    return {kind: make_text_encoder(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_model_s_last_layer(encoders, kind):
    encoder = load_encoder(str(encoders[kind]), 12)
    out = encoder.encode(PROMPTS)
    assert out.mask.sum(dim=1).tolist() == [4, 9, 1]
    ids = torch.tensor([[encoder.tokenizer.get_vocab()[word] for word in ("a", "red", "circle", "</s>")]])
    alone = encoder.model(input_ids=ids)
    torch.testing.assert_close(out.features[0, :4], alone.last_hidden_state[0], rtol=1e-4, atol=1e-5)
    assert (out.pooled is None) == (kind == "t5")
    if out.pooled is not None:
        torch.testing.assert_close(out.pooled[0], alone.pooler_output[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_s_features_do_not_depend_on_its_batch(encoders, kind):
    encoder = load_encoder(str(encoders[kind]), 12)
    together, alone = encoder.encode_all(PROMPTS), [encoder.encode([prompt]) for prompt in PROMPTS]
    for one, other in zip(together, alone):
        assert one.mask.all() and one.features.shape == other.features.shape
        torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-5)


def test_long_prompts_are_cut_and_named(encoders):
    said = []
    encoder = load_encoder(str(encoders["t5"]), 5, warn=said.append)
    out = encoder.encode(["a red circle", "a small red circle of the dark image"])
    assert out.mask.sum(dim=1).tolist() == [4, 5]
    assert said == ["prompts of more than 5 tokens are cut to that: 'a small red circle of the dark image'... (9)"]
    with pytest.warns(UserWarning, match="cut to that: 'a small red"):
        load_encoder(str(encoders["t5"]), 5).encode(["a small red circle of the dark image"])


def test_no_prompt_is_longer_than_the_encoder_s_positions(encoders):
    said = []
    encoder = load_encoder(str(encoders["clip"]), 77, warn=said.append)
    assert encoder.length == 12
    assert encoder.encode(["a " * 40]).mask.sum() == 12 and "more than 12 tokens" in said[0]
    assert load_encoder(str(encoders["t5"]), 77).length == 77  # relative positions


def test_the_space_distinguishes_encoders_but_not_precisions(encoders):
    spaces = {kind: load_encoder(str(folder), 12).space() for kind, folder in encoders.items()}
    assert len({space.sha256 for space in spaces.values()}) == 3
    assert (spaces["t5"].width, spaces["t5"].pooled_width, spaces["clip"].pooled_width) == (16, 0, 16)
    narrow = load_encoder(str(encoders["t5"]), 12, "bf16")
    assert narrow.space().sha256 == spaces["t5"].sha256 and narrow.space().precision == "bf16"
    assert TextSpace.from_dict(json.loads(json.dumps(asdict(spaces["clip"])))) == spaces["clip"]
    rounded = narrow.encode(PROMPTS).features
    difference = (rounded - load_encoder(str(encoders["t5"]), 12).encode(PROMPTS).features).abs().max()
    assert 0 < difference < 0.3


def test_folders_of_pipelines_have_two_sub_folders(encoders, tmp_path):
    encoder = load_encoder(str(encoders["clip"]), 12)
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert load_encoder(str(tmp_path), 12).sha256() == encoder.sha256()


def test_what_is_no_encoder_ends_in_one_line(encoders, tmp_path):
    with pytest.raises(ValueError, match="cannot load the text encoder nobody/nothing"):
        load_encoder("nobody/nothing", 12)
    model = load_encoder(str(encoders["t5"]), 12).model
    for file in encoders["t5"].iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        load_encoder(str(tmp_path), 12)


def test_features_of_batches():
    one = TextFeatures.padded([torch.ones(2, 3), torch.ones(1, 3)], torch.ones(2, 4))
    assert one.mask.tolist() == [[True, True], [True, False]] and one.features.sum() == 9
    both = TextFeatures.joined(one, TextFeatures(torch.zeros(1, 0, 3), torch.zeros(1, 0).bool(), torch.zeros(1, 4)))
    assert both.mask.tolist() == [[True, True], [True, False], [False, False]] and both.pooled.sum() == 8
    assert one.dropped(torch.tensor([True, False])).mask.tolist() == [[False, False], [True, False]]
    assert not one.nothing().mask.any() and torch.equal(one.nothing().features, one.features)
    assert both.rows(torch.tensor([1])).features.tolist() == [[[1.0] * 3, [0.0] * 3]]


def test_unknown_words_are_named(encoders):
    said = []
    encoder = load_encoder(str(encoders["t5"]), 12, warn=said.append)
    out = encoder.encode(["a red circle", "a pink circle of mauve"])
    assert out.mask.sum(dim=1).tolist() == [4, 6]
    assert len(said) == 1 and said[0].endswith("does not know 'mauve', 'pink'")
    said.clear()
    clip = load_encoder(str(encoders["clip"]), 12, warn=said.append)
    clip.encode(["a red circle", "large"])
    assert said == []
