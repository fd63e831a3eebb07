"""What the documentation promises a reader: short sentences, a short README, links and paths that lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lustral

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_WORDS = 35
MOST_README_LINES = 120
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def prose(text: str) -> str:
    """Return a page without code blocks, tables, comments and pictures; links and inline code count as what is read."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "Code", text)
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("|", "#")))


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page; blank lines and items of lists end one too."""
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.) )", prose(text)):
        whole = " ".join(block.replace("**", "").split())
        yield from re.split(r"(?<=[.!?])(?<!e\.g\.)[\")]* (?=[\"(A-Z\d])", whole)


def words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def test_sentences_are_told_apart() -> None:
    text = (
        "# A head\n\nOne idea, `some code here`\nin [two lines](x.md). Another (e.g. 2.5 %)!\n"
        "* An item\n* A second\n\n| a | table |\n"
    )
    found = ["One idea, Code in two lines.", "Another (e.g. 2.5 %)!", "* An item", "* A second"]
    assert list(sentences(text)) == found
    assert [words(sentence) for sentence in found] == [6, 3, 2, 2]


@pytest.mark.parametrize("name", NAMES)
def test_no_sentence_is_longer_than_a_breath(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    long = [f"{words(s)} words: {s}" for s in sentences(text) if words(s) > MOST_WORDS]
    assert not long, "\n".join(long)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES


@pytest.mark.parametrize("name", NAMES)
def test_links_and_paths_lead_somewhere(name: str) -> None:
    text, folder = (ROOT / name).read_text(encoding="utf-8"), (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (folder / link).exists()]
    paths = re.findall(r"`((?:src|tests|benchmarks|docs)/[\w./-]+)`", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    missing += [path for path in re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", text) if not known(path)]
    missing += [module for module in re.findall(r"\blustral((?:\.[a-z_]+)+)\b", text) if not imported(module[1:])]
    assert not missing, f"{name} names what is not there: {', '.join(missing)}"


def known(path: str) -> bool:
    """Say whether a path of a page is one of the repository, or of the library."""
    return (ROOT / path).exists() or (ROOT / "src" / "lustral" / path).exists()


def imported(name: str) -> bool:
    """Say whether a dotted name below the library is a module or package of it, or one of its names."""
    if name in lustral.__all__:
        return True
    source, path = ROOT / "src" / "lustral", ROOT / "src" / "lustral" / name.replace(".", "/")
    places = [path] if path.parent == source else [path, path.parent]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)
