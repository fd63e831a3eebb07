"""Text from outside, shown safely: what a reader cannot see, or a terminal would obey, becomes an escape.

A class name, a file name or an error message may hold a terminal's commands, turn the direction of reading, or break a line so
that it looks like an answer of ours. Imports nothing beyond the standard library.
"""

from __future__ import annotations

import unicodedata

INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
)  # letters and marks in name, but nothing is drawn


def visible(text: str, *, keep: str = "") -> str:
    r"""Return the text with an escape in place of each control, format, unassigned or lone surrogate character.

    Line breaks and tabs are control characters, zero-width and bidirectional ones are format characters; spaces of any width
    stay. The rest of Unicode stays as it is, so the result can be encoded and read.

    Args:
        text: anything.
        keep: characters that stay whatever they are, e.g. line breaks of a text of ours.

    >>> print(visible("caf\u00e9 \x1b[31m \u202e"))
    café \x1b[31m \u202e
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(each if each in keep or _is_seen(each) else _escape(each) for each in text)


def _is_seen(character: str) -> bool:
    return (character.isprintable() or unicodedata.category(character) == "Zs") and character not in INVISIBLE


def _escape(character: str) -> str:
    code = character.encode("unicode_escape").decode("ascii")
    return code if code.startswith("\\") else f"\\u{ord(character):04x}"
