"""A text encoder from nothing: its words, what it learns from, and that it learns."""

import json
import re

import pytest
import torch

from diffusion_moe.cli import main
from diffusion_moe.data.shapes import WORDS
from diffusion_moe.data.shapes.captions import MENTIONS, Mention, describe
from diffusion_moe.data.shapes.scene import HELD_OUT_LOOKS, Content, Look, contents, held_out, seen_contents
from diffusion_moe.text import load_encoder
from diffusion_moe.text_training.options import TextEncoderOptions
from diffusion_moe.text_training.pairs import held_out_pairs, training_pairs
from diffusion_moe.text_training.tokenizer import make_tokenizer
from diffusion_moe.text_training.train import inputs, make_text_encoder, new_model, rate, train

TINY = ["--width=16", "--layers=1", "--heads=2", "--steps=12", "--batch_size=16"]


def test_a_token_is_a_word():
    tokenizer = make_tokenizer(WORDS)
    assert len(tokenizer) == len(WORDS) + 3
    ids = tokenizer(["A red circle, left of a SQUARE.", "a pink circle"])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == [*"a red circle left of a square".split(), "</s>"]
    assert tokenizer.convert_ids_to_tokens(ids[1]) == ["a", "<unk>", "circle", "</s>"]
    assert not any(tokenizer.unk_token_id in row for row in tokenizer(list(WORDS))["input_ids"])


def test_the_plain_caption_is_one_for_all_that_say_the_same():
    circle, square = Look("circle", "red"), Look("square", "blue")
    assert describe(Content((circle, square), "right of"), Mention(colour=True, relation=True)) == (
        "a red circle right of a blue square"
    )
    assert describe(Content((circle, square), "above"), Mention()) == "a circle and a square"
    assert describe(Content((circle,) * 3), Mention(colour=True)) == "three red circles"
    assert describe(Content((Look("cross", "white", "large"),)), Mention(size=True)) == "a large cross"


def test_pairs_say_the_same_and_show_only_what_is_seen():
    pairs = training_pairs(0, 5, 400)
    assert pairs == training_pairs(0, 5, 400) != training_pairs(0, 6, 400)
    said = {describe(content, mention) for content in seen_contents() for mention in MENTIONS[content.kind]}
    assert {pair.plain for pair in pairs} <= said
    looks = "|".join(f"{colour} {shape}" for shape, colour in HELD_OUT_LOOKS)
    assert not any(re.search(looks, text) for pair in pairs for text in pair)
    for pair in pairs:  # the same objects, whatever stands around and between them
        caption = re.sub(r"^(a picture of|there is|there are) ", "", pair.caption)
        words = re.compile("|".join([*"red yellow green blue purple white small large two three four".split()]))
        assert sorted(words.findall(caption)) == sorted(words.findall(pair.plain))
    counts = [pair.plain.split()[0] in ("two", "three", "four") for pair in pairs]
    assert 0.25 < sum(counts) / len(counts) < 0.42


def test_a_converse_is_turned_round():
    converse = [pair for pair in training_pairs(0, 1, 2000) if pair.caption == "a square right of a circle"]
    assert {pair.plain for pair in converse} <= {"a circle left of a square"}
    turned = {pair.caption: pair.plain for pair in training_pairs(0, 1, 4000)}
    assert turned["a square above a circle"] == "a circle below a square"
    assert turned["a circle below a square"] == "a circle below a square"


def test_held_out_pairs_are_none_of_the_training_s():
    pairs = held_out_pairs(0)
    seen = {describe(content, mention) for content in seen_contents() for mention in MENTIONS[content.kind]}
    assert len(pairs) == len({pair.plain for pair in pairs}) and seen.isdisjoint(pair.plain for pair in pairs)
    plain = {pair.plain for pair in pairs}
    assert {"a purple circle", "two triangles", "a circle and a cross", "a circle left of a square"} <= plain
    assert "a circle" not in plain and sum(bool(held_out(content)) for content in contents()) > 500


def test_the_rate_rises_and_falls():
    assert [round(rate(step, 100), 4) for step in (1, 5, 10, 55, 100)] == [0.1, 0.5, 1.0, 0.5, 0.0]


def test_padding_is_no_target():
    tokenizer = make_tokenizer(WORDS)
    pairs = [pair for pair in training_pairs(0, 1, 50)]
    batch = inputs(tokenizer, pairs)
    for pair, labels, mask in zip(pairs, batch["labels"], batch["attention_mask"]):
        assert (labels != -100).sum() == len(pair.plain.split()) + 1
        assert mask.sum() == len(pair.caption.split()) + 1


def test_training_learns():
    """From log(36) = 3.58 nats a token at the start."""
    options = TextEncoderOptions(width=32, layers=1, heads=2, dropout=0.0, steps=150, batch_size=64)
    tokenizer = make_tokenizer(WORDS)
    torch.manual_seed(0)
    model = new_model(tokenizer, options)
    before = model(**inputs(tokenizer, training_pairs(0, 1, 64))).loss
    assert before > 3.5
    assert train(model, tokenizer, options, lambda line: None) < 0.6


def test_the_command_writes_an_encoder_that_training_reads(tmp_path, capsys):
    folder = tmp_path / "encoder"
    assert main(["text-encoder", str(folder), *TINY]) == 0
    encoder = load_encoder(str(folder), 16)
    space = encoder.space()
    assert (space.width, space.pooled_width, space.length) == (16, 0, 16)
    record = json.loads((folder / "training.json").read_text())
    assert record["options"]["steps"] == 12 and set(record["exact"]) == {"seen", "held_out"}
    assert not list(folder.glob("*.bin")) and not (tmp_path / "encoder.partial").exists()
    # Words hear of each other: "red" is not the same beside a circle and beside a square.
    red = [encoder.encode([f"a red {shape}"]).features[0, 1] for shape in ("circle", "square")]
    assert (red[0] - red[1]).abs().max() > 1e-3
    # Once more: the same options find it, others are refused; elsewhere the same bits.
    capsys.readouterr()
    assert main(["text-encoder", str(folder), *TINY]) == 0
    assert "holds this text encoder already" in capsys.readouterr().out
    assert main(["text-encoder", str(folder), *TINY, "--seed=1"]) == 2
    assert "an encoder of other options; give another folder" in capsys.readouterr().err
    again, other = tmp_path / "again", tmp_path / "other"
    assert main(["text-encoder", str(again), *TINY]) == main(["text-encoder", str(other), *TINY, "--seed=1"]) == 0
    assert load_encoder(str(again), 16).sha256() == space.sha256 != load_encoder(str(other), 16).sha256()


def test_what_is_there_stays(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="holds something else, or an encoder of other options"):
        make_text_encoder(tmp_path, TextEncoderOptions(steps=1))
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(ValueError, match="width 30 is not divisible by heads 4"):
        TextEncoderOptions(width=30)
