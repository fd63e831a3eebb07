"""The section of a model card: its figures, and what hostile names and cards cannot do."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from lustral.exchange.model_card import BEGIN, END, code, model_card, section_text

RATE = {"value": 0.5, "low": 0.4, "high": 0.6, "hits": 100, "n": 200}
VERDICT = {"outcome": "backdoored", "suspect_labels": [1]}
RECORD: dict[str, Any] = {
    "model": "models/theirs",
    "command": "lustral erase models/theirs --data pictures --out erased",
    "method": "baeraser",
    "clean_images": 1200,
    "classes": ["ant", "bee"],
    "versions": {"lustral": "0.1.0", "torch": "2.14.1"},
    "file_safety": {"files": [{"file": "models/theirs/model.safetensors", "sha256": "a" * 64}]},
    "accuracy": {"clean images": {"before": {**RATE, "value": 0.9}, "after": {**RATE, "value": 0.875}}},
    "purified": {"verdict": VERDICT, "audit": {"outcome": "clean", "suspect_labels": []}, "selected": 3},
    "recovered": [{"class": "bee", "before": {**RATE, "value": 0.995}, "after": {**RATE, "value": 0.01}}],
}
DIGESTS = {"model.safetensors": "b" * 64}


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RECORD), **changes}


def test_the_section_says_what_was_found_and_done_with_figures() -> None:
    text = section_text(RECORD, DIGESTS, ["pytorch_model.bin"])
    for line in (
        "| found | backdoored, towards `bee` |",
        "| done | erased, method `baeraser`, with 1,200 clean images |",
        "| scanned again | no backdoor found |",
        "| by | lustral `0.1.0`, torch `2.14.1` |",
        "| left out, not erased | `pytorch_model.bin` |",
        "| clean accuracy, clean images | 90.0% of 200 images | 87.5% of 200 images |",
        "| recovered trigger works, towards `bee` | 99.5% of 200 images | 1.0% of 200 images |",
        f"| `model.safetensors` | `{'a' * 64}` | `{'b' * 64}` |",
        "```bash\nlustral erase models/theirs --data pictures --out erased\n```",
    ):
        assert line in text
    assert "it cannot prove that there is none" in text


def test_what_was_not_done_is_said() -> None:
    purified = {"verdict": None, "audit": None, "selected": None}
    text = section_text(changed(purified=purified, recovered=[]), DIGESTS)
    assert "| found | the model was not scanned |" in text
    assert "| done | nothing was changed, method" in text
    assert "| scanned again | no |" in text
    assert "recovered trigger" not in text
    assert "left out" not in text
    nothing = {"value": None, "low": None, "high": None, "hits": 0, "n": 0}
    text = section_text(changed(accuracy={"clean images": {"before": nothing, "after": nothing}}), DIGESTS)
    assert "| clean accuracy, clean images | – | – |" in text


def test_true_figures_stand_where_the_true_trigger_is_known() -> None:
    known = {"before": {"asr": {**RATE, "value": 1.0}}, "after": {"asr": {**RATE, "value": 0.02}}}
    assert "| true trigger works | 100.0% of 200 images | 2.0% of 200 images |" in section_text(
        changed(**known), DIGESTS
    )


def test_a_new_card_has_a_heading_and_the_section() -> None:
    card = model_card(None, RECORD, DIGESTS)
    assert card.startswith(b"# `theirs`\n\n" + BEGIN + b"\n## Backdoor check\n")
    assert card.endswith(END + b"\n")


def test_the_section_is_put_at_the_end_and_replaced_when_made_again() -> None:
    given = b"---\nlicense: mit\n---\n# Th\xe9irs\r\nText\n"
    first = model_card(given, RECORD, DIGESTS)
    assert first.startswith(given.rstrip() + b"\n\n" + BEGIN)
    assert model_card(first, RECORD, DIGESTS) == first
    later = model_card(first + b"More\n", changed(method="sau"), DIGESTS)
    assert later.count(BEGIN) == later.count(END) == 1
    assert b"`sau`" in later
    assert b"`baeraser`" not in later
    assert later.startswith(given.rstrip())
    assert later.endswith(END + b"\nMore\n")


@pytest.mark.parametrize("given", [BEGIN + b"\nText", END + b"\nText", END + b"\nText\n" + BEGIN, b""])
def test_marks_that_make_no_pair_cost_nothing_of_the_card(given: bytes) -> None:
    first = model_card(given, RECORD, DIGESTS)
    again = model_card(first, changed(method="sau"), DIGESTS)
    for card in (first, again):
        assert card.startswith(given.rstrip())
        assert card.count(b"## Backdoor check") == 1


@pytest.mark.parametrize(
    "name", ["a`b", "a|b", "<img src=x>", "![x](http://x)", END.decode(), "a\nb", "\u202eabc", "x" * 5000]
)
def test_names_from_outside_stay_code(name: str) -> None:
    shown = code(name)
    assert shown[0] == shown[-1] == "`"
    assert not set(shown[1:-1]) & set("`|\n\u202e")
    assert len(shown) <= 83
    record = changed(classes=["ant", name], model=f"models/{name}", method=name)
    lines = section_text(record, {name: "b" * 64}, [name]).splitlines()
    assert len(lines) == len(section_text(RECORD, DIGESTS, ["x"]).splitlines())
    assert all(line.count("|") in (0, 3, 4) for line in lines)


def test_a_command_cannot_end_its_block() -> None:
    lines = section_text(changed(command="lustral erase 'a```\n# b'"), DIGESTS).splitlines()
    start = lines.index("````bash")
    assert lines[start + 1 : start + 3] == ["lustral erase 'a``` # b'", "````"]


def test_a_mark_in_a_name_does_not_end_the_section() -> None:
    first = model_card(b"Text\n", changed(method=END.decode()), DIGESTS)
    assert model_card(first, RECORD, DIGESTS) == model_card(b"Text\n", RECORD, DIGESTS)
