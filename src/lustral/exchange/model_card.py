"""A section of a model card, ``README.md`` of a model folder: what was found in the model, what was done, and the figures.

It stands between two marks, and takes the place of an earlier one. The rest of the card stays as it is. Names of classes and
files come from outside: they are shown as code, in which nothing is a link, a picture or a tag.

Reference: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lustral.exchange.checks import LIMITS

Record = Mapping[str, Any]
BEGIN, END = b"<!-- lustral: begin -->", b"<!-- lustral: end -->"
LONGEST_NAME = 80  # characters of a name that is shown
MOST_NAMES = 8  # in a sentence
ANSWERS = {"backdoored": "backdoored", "clean": "no backdoor found", "cannot tell": "cannot tell"}


def model_card(given: bytes | None, record: Record, digests: Mapping[str, str], left_out: Sequence[str] = ()) -> bytes:
    """Return a model card with the section of an erasure in it.

    Args:
        given: the card; None: there is none yet.
        record: ``result.json`` of ``lustral erase``.
        digests: SHA-256 of each new file of weights, by its name.
        left_out: files of the given folder that the new one has not.
    """
    section = BEGIN + b"\n" + section_text(record, digests, left_out).encode() + END
    if given is None:
        return b"# " + code(PurePath(record["model"]).name or "model").encode() + b"\n\n" + section + b"\n"
    end = given.rfind(END)
    begin = given.rfind(BEGIN, 0, max(end, 0))
    if begin < 0:
        return given.rstrip() + b"\n\n" + section + b"\n"
    return given[:begin] + section + given[end + len(END) :]


def section_text(record: Record, digests: Mapping[str, str], left_out: Sequence[str] = ()) -> str:
    """Return the section as Markdown; see ``model_card``."""
    files = {PurePath(each["file"]).name: each["sha256"] for each in record["file_safety"]["files"]}
    weights = [(code(name), code(files.get(name, "")), code(digest)) for name, digest in digests.items()]
    parts = [
        "## Backdoor check",
        _table(("", ""), _facts(record, left_out)),
        _table(("", "before", "after"), _figures(record)),
        _table(("weights", "SHA-256 of the given file", "SHA-256 of this file"), weights),
        _fenced(record["command"]),
        LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def code(text: str) -> str:
    """Return text as code inside of a line or a table, without what could end it.

    >>> code("a`|<b>"), code("x" * 100) == code("x" * 80 + "…")
    ("`a'/<b>`", True)
    """
    shown = text if len(text) <= LONGEST_NAME else text[:LONGEST_NAME] + "…"
    return f"`{_printable(shown).replace('`', chr(39)).replace('|', '/') or ' '}`"


def _printable(text: str) -> str:
    """Return text on one line, without the mark of a comment."""
    return "".join(letter if letter.isprintable() else " " for letter in text).replace("<!--", "< !--")


def _facts(record: Record, left_out: Sequence[str]) -> list[tuple[str, ...]]:
    purified = record["purified"]
    verdict, audit = purified["verdict"], purified["audit"]
    done = "nothing was changed" if purified["selected"] is None else "erased"
    versions = record["versions"]
    rows: list[tuple[str, ...]] = [
        ("found", "the model was not scanned" if verdict is None else _answer(verdict, record)),
        ("done", f"{done}, method {code(record['method'])}, with {record['clean_images']:,} clean images"),
        ("scanned again", "no" if audit is None else _answer(audit, record)),
        ("by", ", ".join(f"{name} {code(str(version))}" for name, version in versions.items())),
    ]
    if left_out:
        rows.append(("left out, not erased", _listing(left_out)))
    return rows


def _answer(verdict: Record, record: Record) -> str:
    names = [record["classes"][label] for label in verdict["suspect_labels"]]
    answer = ANSWERS[verdict["outcome"]]
    return f"{answer}, towards {_listing(names)}" if names else answer


def _figures(record: Record) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (f"clean accuracy, {name}", *_both(rates)) for name, rates in record["accuracy"].items()
    ]
    rows += [(f"recovered trigger works, towards {code(each['class'])}", *_both(each)) for each in record["recovered"]]
    if "before" in record:
        true = {when: record[when]["asr"] for when in ("before", "after")}
        rows.append(("true trigger works", *_both(true)))
    return rows


def _both(rates: Mapping[str, Any]) -> tuple[str, str]:
    return _percent(rates["before"]), _percent(rates["after"])


def _percent(rate: Mapping[str, Any]) -> str:
    return "–" if rate["value"] is None else f"{rate['value']:.1%} of {rate['n']:,} images"


def _listing(names: Sequence[str]) -> str:
    more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(map(code, names[:MOST_NAMES])) + more


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fenced(text: str) -> str:
    """Return text as a block of code, which no backtick in it can end."""
    plain = _printable(text)
    fence = "```"
    while fence in plain:
        fence += "`"
    return f"{fence}bash\n{plain}\n{fence}"
