"""Labels are brought into the model's order by the names of the classes, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lustral.vision.records import ImageSet
from lustral.vision.sources import ClassNamesError, check_class_names, in_class_order, read_class_names


def images(*names: str) -> ImageSet:
    count = max(len(names), 3)
    return ImageSet(
        images=torch.arange(count).to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2),
        labels=torch.arange(count),
        num_classes=count,
        class_names=names,
    )


@pytest.mark.parametrize(
    ("own", "given", "labels"),
    [
        (("ant", "bee", "cat"), ("cat", "ant", "bee"), [1, 2, 0]),
        (("1", "10", "2"), ("1", "2", "10"), [0, 2, 1]),  # folders by name, classes by number
        (("Tabby_cat", "dog", "ox"), ("ox", "tabby cat", "Dog"), [1, 2, 0]),
        (("a b", "a_b", "c"), ("c", "a_b", "a b"), [2, 1, 0]),  # the same only if blanks count
    ],
)
def test_labels_follow_their_names(own: tuple[str, ...], given: tuple[str, ...], labels: list[int]) -> None:
    moved = in_class_order(images(*own), given)
    assert moved.labels.tolist() == labels
    assert moved.class_names == given
    assert torch.equal(moved.images, images(*own).images)


@pytest.mark.parametrize(
    ("own", "given", "said"),
    [
        (("ant", "bee", "cat"), ("ant", "bee"), "only the data have: cat"),
        (
            ("ant", "bee", "cat"),
            ("ant", "bee", "cat", "d\x1bog"),
            r"only the model has: d\\x1bog; only the data have: none",
        ),
        (("ant", "bee", "cat"), ("ant", "bee", "cow"), "only the model has: cow; only the data have: cat"),
        (("a_b", "a b", "c"), ("c", "A B", "d"), "only the model has: d"),
        ((), ("ant", "bee", "cat"), "do not name their classes"),
    ],
)
def test_other_classes_are_an_error_that_lists_both(own: tuple[str, ...], given: tuple[str, ...], said: str) -> None:
    with pytest.raises(ClassNamesError, match=said):
        in_class_order(images(*own), given)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "cat\nant dog\n\n[/red]\n"),
        ("names.txt", "\ufeffcat\r\nant dog\r\n[/red]"),
        ("names.txt", '["cat", "ant dog", "[/red]"]'),
        ("names.json", '["cat", "ant dog", "[/red]"]'),
        ("names.json", '{"2": "[/red]", "0": "cat", "1": "ant dog"}'),
        ("config.json", json.dumps({"model_type": "x", "id2label": {"0": "cat", "1": "ant dog", "2": "[/red]"}})),
    ],
)
def test_files_of_names(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8")
    assert read_class_names(tmp_path / file) == ("cat", "ant dog", "[/red]")


def test_a_list_of_bracketed_lines_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("[/red]\n[blue]\n")
    assert read_class_names(tmp_path / "names.txt") == ("[/red]", "[blue]")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cat\ndog\ncat\n", "more than once: cat"),
        (b"", "at least 2 names"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 100_000, "damaged JSON"),
        (b'["cat", 3]', "JSON list of names"),
        (b'{"id2label": {"0": "cat", "2": "dog"}}', "without a gap"),
        (b'{"id2label": 3}', "by numbers"),
        (b"x\n" * 600_000, "1,200,000 bytes"),
    ],
)
def test_files_that_name_no_classes(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_bytes(content)
    with pytest.raises(ClassNamesError, match=said):
        read_class_names(tmp_path / "names.json")


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none", tmp_path / "pipe"):
        with pytest.raises(ClassNamesError, match="no such file"):
            read_class_names(path)


class Counted(str):
    """Text that counts how often it is compared."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.mark.parametrize("strangers", [0, 300])
def test_many_names_are_compared_a_few_times_each(strangers: int) -> None:
    own = [Counted(f"class {number}") for number in range(1000)]
    names = [Counted(f"class {number}") for number in reversed(range(strangers, 1000 + strangers))]
    Counted.comparisons = 0
    if strangers:
        with pytest.raises(ClassNamesError, match="only the model has: class 1299, "):
            check_class_names(own, names)
    else:
        assert check_class_names(own, names) == list(reversed(range(1000)))
    assert Counted.comparisons < 50_000  # each with each would be a million


def test_long_names_are_cut_in_messages(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("x" * 10_000 + "\nb\n")
    with pytest.raises(ClassNamesError) as caught:
        check_class_names(["a", "b"], read_class_names(tmp_path / "names.txt"))
    assert "x" * 100 + "..." in str(caught.value)
    assert len(str(caught.value)) < 500
