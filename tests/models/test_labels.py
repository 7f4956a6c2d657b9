"""Classes as users give them: names first, then numbers; where they contradict each other, a question."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_moe.models.labels import by_name, checked, class_number

BIRDS = {0: "tench, Tinca tinca", 1: "golden retriever, goldie", 2: "crane", 3: "maillot", 4: "crane, machine"}


def read(text, names, count=None):
    names = dict(enumerate(names))
    return class_number(text, by_name(names), len(names) if count is None else count)


def test_a_name_or_a_synonym_or_the_whole_text():
    known = by_name(BIRDS)
    texts = ["tench", " Tinca tinca ", "golden retriever, goldie", "goldie", "machine", "name:maillot", "3", "#1"]
    assert [class_number(text, known, 5) for text in texts] == [0, 0, 1, 1, 4, 3, 3, 1]


def test_sorted_folders_of_numbers():
    names = ["0", "1", "10", "11", "2"]
    assert [read(text, names) for text in ("0", "1", "10", "11")] == [0, 1, 2, 3]  # there are no classes 10 and 11
    assert [read(text, names) for text in ("#2", "name:2", "3", "4", "name: 10", " #04 ")] == [2, 4, 3, 4, 2, 4]
    with pytest.raises(ValueError) as caught:
        read("2", names)
    assert str(caught.value) == (
        "'2' is the name of class 4 and the number of another; give #2 for the number or name:2 for the name"
    )


def test_names_that_look_like_prefixes():
    names = ["#2", "#tag", "name:x", "x"]
    assert [read(text, names) for text in ("#2", "name:#2", "#tag", "name:name:x", "name:x")] == [2, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("golden retreiver", "there is no class 'golden retreiver'; did you mean golden retriever or goldie?"),
        ("zzz", "there is no class 'zzz'; give a number from 0 to 4"),
        ("", "there is no class ''; give a number from 0 to 4"),
        ("name:2", "there is no class '2'; give a number from 0 to 4"),
        ("²", "there is no class '²'; give a number from 0 to 4"),
        ("crane", "'crane' is the name of classes 2, 4; give one as #2"),
        ("5", "class 5 is out of range; the model has classes 0 to 4"),
        ("#5", "class 5 is out of range; the model has classes 0 to 4"),
        ("-1", "class -1 is out of range; the model has classes 0 to 4"),
    ],
)
def test_what_is_no_class_is_one_line(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        class_number(text, by_name(BIRDS), 5)


def test_numbers_out_of_range_name_what_is_near_and_names_may_be_unknown():
    with pytest.raises(ValueError, match=r"^class 100 is out of range; .* 0 to 1; did you mean 1000\?$"):
        read("100", ["1000", "x"])
    with pytest.raises(ValueError, match=r"'tench', because the classes have no names here .* a number from 0 to 9$"):
        read("tench", [], 10)
    assert read("7", [], 10) == 7
    with pytest.raises(ValueError, match="class 7 is out of range"):
        class_number("tench", by_name({7: "tench"}), 5)
    with pytest.raises(ValueError, match="class 5 is out of range"):
        checked(5, 5)


@st.composite
def named_by_numbers(draw):
    """Classes named by a permutation of their numbers, counted from 0 or later."""
    count, first = draw(st.integers(1, 30)), draw(st.integers(0, 30))
    return draw(st.permutations([str(first + i) for i in range(count)]))


@given(named_by_numbers(), st.integers(-2, 70))
def test_a_permutation_of_numbers_never_gives_another_class_than_was_meant(names, number):
    count, text = len(names), str(number)
    as_name = names.index(text) if text in names else None
    as_number = number if 0 <= number < count else None
    meant = {place for place in (as_name, as_number) if place is not None}
    for given_text, expected in ((text, meant), (f"#{text}", {as_number}), (f"name:{text}", {as_name})):
        expected = expected - {None}
        if len(expected) == 1:
            assert {read(given_text, names)} == expected
        else:
            with pytest.raises(ValueError) as caught:
                read(given_text, names)
            line = str(caught.value)
            assert text in line and "\n" not in line
            assert (f"give #{text} for the number or name:{text}" in line) == (len(expected) == 2)


@given(st.lists(st.text(st.characters(exclude_characters=","), max_size=6), min_size=1, max_size=12))
def test_every_class_can_be_reached_by_number_and_a_name_of_its_own_by_name(names):
    known = by_name(dict(enumerate(names)))
    for place, name in enumerate(names):
        assert class_number(f"#{place}", known, len(names)) == place
        plain = name.strip()
        if plain and [other.strip() for other in names].count(plain) == 1:
            assert class_number(f"name:{name}", known, len(names)) == place
