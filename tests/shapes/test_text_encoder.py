"""A text encoder from nothing: its words, what it learns from, and that it learns."""

import json
import random
import re

import pytest
import torch

from diffusion_moe.cli import main
from diffusion_moe.shapes.captions import MENTIONS, WORDS, Mention
from diffusion_moe.shapes.scene import COLOURS, HELD_OUT_LOOKS, SHAPES, Content, Look, seen_contents
from diffusion_moe.shapes.text_encoder.facts import (
    FACTS,
    IGNORED,
    example,
    held_out_examples,
    in_one_way,
    texts,
    training_examples,
)
from diffusion_moe.shapes.text_encoder.options import TextEncoderOptions
from diffusion_moe.shapes.text_encoder.train import FactReader, make_text_encoder, make_tokenizer, rate, to_batch, train
from diffusion_moe.text import load_encoder

TINY = ["--width=16", "--layers=1", "--heads=2", "--steps=12", "--batch_size=16"]
PAIR = Content((Look("circle", "red"), Look("square", "blue")), "left of")


def mentioned(some):
    """Words of an example that name an object, with their facts as words."""
    named = [(word, row) for word, row in zip(some.words, some.facts) if row != (IGNORED,) * len(FACTS)]
    values = list(FACTS.values())
    return [(word, *("?" if n == IGNORED else values[i][n] for i, n in enumerate(row))) for word, row in named]


def test_a_token_is_a_word():
    tokenizer = make_tokenizer(WORDS)
    assert len(tokenizer) == len(WORDS) + 3
    ids = tokenizer(["A red circle, left of a SQUARE.", "a pink circle", "a <unk> circle"])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == [*["a", "red", "circle", "left", "of", "a", "square"], "</s>"]
    assert tokenizer.convert_ids_to_tokens(ids[1]) == ["a", "<unk>", "circle", "</s>"] and ids[1] == ids[2]
    assert not any(tokenizer.unk_token_id in row for row in tokenizer(list(WORDS))["input_ids"])


def test_the_facts_of_a_pair():
    """Whichever is named first, each object's own colour, and its position."""
    circle, square = ("circle", "one", "none", "red", "left of"), ("square", "one", "none", "blue", "right of")
    mention, seen = Mention(colour=True, relation=True), set()
    for seed in range(20):
        some = example(PAIR, mention, random.Random(seed))
        assert sorted(mentioned(some)) == [("circle", *circle), ("square", *square)]
        seen.add(some.words.index("circle") < some.words.index("square"))
    assert seen == {True, False}
    silent = mentioned(example(PAIR, Mention(), random.Random(0)))
    assert sorted(silent) == [(s, s, "one", "none", "none", "none") for s in ("circle", "square")]


def test_the_whole_caption_has_the_facts_of_both_objects_in_order():
    """An object that is not named is none; what an unknown word says is not asked here either."""
    some = example(PAIR, Mention(colour=True), random.Random(3))
    nouns = [row for row in some.facts if row != (IGNORED,) * len(FACTS)]
    assert some.objects == (*nouns[0], *nouns[1]) and nouns[0] != nouns[1]
    none = tuple(len(values) for values in FACTS.values())
    single = example(Content((Look("cross", "white"),) * 3), Mention(), random.Random(0))
    assert single.objects[len(FACTS) :] == none and single.objects[0] == SHAPES.index("cross")
    assert IGNORED in example(PAIR, Mention(colour=True), random.Random(1), masked=1.0).objects


def test_the_facts_of_counts_and_sizes():
    three = Content((Look("cross", "white"),) * 3)
    assert mentioned(example(three, Mention(colour=True), random.Random(0))) == [
        ("crosses", "cross", "three", "none", "white", "none")
    ]
    large = Content((Look("circle", "red", "large"),))
    assert mentioned(example(large, Mention(size=True), random.Random(0))) == [
        ("circle", "circle", "one", "large", "none", "none")
    ]


def test_facts_of_an_unknown_word_are_not_asked():
    some = example(PAIR, Mention(colour=True, relation=True), random.Random(1), masked=1.0)
    assert some.words.count("<unk>") == 4
    assert sorted(mentioned(some)) == [("<unk>", "?", "one", "none", "?", r) for r in ("left of", "right of")]
    examples = training_examples(0, 1, 2000)
    shown = sum(word in SHAPES or word in COLOURS or word == "<unk>" for some in examples for word in some.words)
    assert 0.1 < sum(some.words.count("<unk>") for some in examples) / shown < 0.2


def test_training_shows_only_what_is_seen():
    examples = training_examples(0, 5, 2000)
    assert training_examples(0, 5, 99) == training_examples(0, 5, 99) != training_examples(0, 6, 99)
    said = " | ".join(texts(examples))
    for shape, colour in HELD_OUT_LOOKS:
        assert not re.search(rf"{colour} {shape}", said)
    assert not re.search("two triangles|three squares|four circles|large cross", said)
    assert not re.search("circle (to the )?left of a square|square (to the )?right of a circle", said)
    counts = [any(word in ("two", "three", "four") for word in some.words) for some in examples]
    assert 0.28 < sum(counts) / len(counts) < 0.39


def test_held_out_captions_are_none_of_the_training_s():
    held_out = texts(held_out_examples(0))
    assert len(held_out) == len(set(held_out)) == 696
    seen = {in_one_way(content, mention) for content in seen_contents() for mention in MENTIONS[content.kind]}
    bare = {re.sub("^(a picture of|there is|there are) ", "", text).replace("one ", "a ") for text in held_out}
    assert {"a purple circle", "two triangles", "a large cross"} <= bare
    assert bare & {"a circle and a cross", "a cross and a circle"} and not bare & {"a circle", "two circles"}
    assert seen.isdisjoint(held_out)


def test_the_rate_rises_and_falls():
    assert [round(rate(step, 100), 4) for step in (1, 5, 10, 55, 100)] == [0.1, 0.5, 1.0, 0.5, 0.0]


def test_facts_are_at_their_tokens():
    tokenizer = make_tokenizer(WORDS)
    batch = to_batch(tokenizer, training_examples(0, 1, 50, masked=0.0))
    named = batch.facts_BLF[..., 0] != IGNORED
    shapes = tokenizer.convert_ids_to_tokens(batch.input_ids[named].tolist())
    assert [SHAPES[n] for n in batch.facts_BLF[..., 0][named].tolist()] == [
        shape.removesuffix("es") if shape == "crosses" else shape.removesuffix("s") if shape != "cross" else shape
        for shape in shapes
    ]


def test_training_learns_the_colour_of_each_object():
    options = TextEncoderOptions(width=32, layers=2, heads=2, steps=200, batch_size=64)
    tokenizer = make_tokenizer(WORDS)
    torch.manual_seed(0)
    model = FactReader(tokenizer, options)
    seen = to_batch(tokenizer, training_examples(0, 999, 200, masked=0.0))
    before = model.accuracy(seen)
    assert model.loss(seen) > 18 and max(before.values()) < 0.05
    train(model, tokenizer, options, lambda line: None)
    after = model.accuracy(seen)
    assert model.loss(seen) < 4 and after["words"] > 0.75 and after["mean"] > 0.5


def test_the_command_writes_an_encoder_that_training_reads(tmp_path, capsys):
    folder = tmp_path / "encoder"
    assert main(["text-encoder", str(folder), *TINY]) == 0
    encoder = load_encoder(str(folder), 16)
    space = encoder.space()
    assert (space.width, space.pooled_width, space.length) == (16, 0, 16)
    record = json.loads((folder / "training.json").read_text())
    assert record["options"]["steps"] == 12 and set(record["read_right"]) == {"seen", "held_out"}
    assert record["read_right"]["seen"].keys() == {"words", "mean"}
    assert not list(folder.glob("*.bin")) and not (tmp_path / "encoder.partial").exists()
    # Words see each other: "red" is not the same beside a circle and beside a square.
    red = [encoder.encode([f"a red {shape}"]).features[0, 1] for shape in ("circle", "square")]
    assert (red[0] - red[1]).abs().max() > 1e-3
    # Once more: the same options find it, others are refused; elsewhere the same bits.
    capsys.readouterr()
    assert main(["text-encoder", str(folder), *TINY]) == 0
    assert "holds this text encoder already" in capsys.readouterr().out
    assert main(["text-encoder", str(folder), *TINY, "--seed=1"]) == 2
    assert "an encoder of other options or version; give another folder" in capsys.readouterr().err
    again, other = tmp_path / "again", tmp_path / "other"
    assert main(["text-encoder", str(again), *TINY]) == main(["text-encoder", str(other), *TINY, "--seed=1"]) == 0
    assert load_encoder(str(again), 16).sha256() == space.sha256 != load_encoder(str(other), 16).sha256()


def test_existing_files_stay(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="holds something else, or an encoder of other options or version"):
        make_text_encoder(tmp_path, TextEncoderOptions(steps=1))
    assert (tmp_path / "mine").read_text() == "mine"
    with pytest.raises(ValueError, match="width 30 is not divisible by heads 4"):
        TextEncoderOptions(width=30)
