"""Names from outside, shown safely."""

import pytest

from lustral.core.characters import visible


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),  # a terminal's command
        ("a\nb\r\tc\x00", r"a\nb\r\tc\x00"),
        ("\x9b2J\x85", r"\x9b2J\x85"),  # C1: the same command in one character
        ("\u202egnp.\u2066x\u2069", r"\u202egnp.\u2066x\u2069"),
        ("a\u200bb\u200d\ufeff\u00ad", r"a\u200bb\u200d\ufeff\xad"),
        ("\u2028\u2029\ue000\U000e0041", r"\u2028\u2029\ue000\U000e0041"),
        ("caf\udce9", r"caf\udce9"),  # a byte of a file name that is not UTF-8
        ("\u3164\u115f", r"\u3164\u115f"),  # fillers: letters that are not drawn
    ],
)
def test_what_a_reader_cannot_see_is_escaped(hostile: str, shown: str) -> None:
    assert visible(hostile) == shown
    assert visible(hostile).isprintable()
    assert visible(visible(hostile)) == shown


@pytest.mark.parametrize("name", ["cat", "[/red]", "Käse", "猫", "кошка", "a b\u00a0c", "\\x1b", "", "🐈"])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert visible(name) == name


def test_line_breaks_of_ours_can_stay() -> None:
    assert visible("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
