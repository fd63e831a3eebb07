"""``lustral sift`` and ``lustral train``: what they write, what they return, and how they fail."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Generator

from lustral.api.score_files import class_folders, csv_text
from lustral.catalog import SAFE_TRAINERS, SIFTERS
from lustral.cli import main
from lustral.cli.arguments import UsageError, parse, parse_untrusted
from lustral.cli.untrusted.arguments import Sift, Train
from lustral.core.records import Cost, OnProgress
from lustral.training import Trainer
from lustral.vision.models import load_model
from lustral.vision.records import Sifted, TrainingView
from lustral.vision.safe_training.plain import PlainTraining
from lustral.vision.sources import load_source

SIDE = 12
CLASSES = ("ant", "bee", "cow")


@dataclass(frozen=True, kw_only=True)
class Corner:
    """Look at the corner: the brighter, the more suspicious.

    Attributes:
        threshold: brightness from which an image is listed.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "eyes"
    cost_passes: ClassVar[float] = 0.01
    least_images: ClassVar[int] = 30

    threshold: float = 0.9

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        scores = torch.cat([batch.inputs[:, :, -2:, -2:].mean((1, 2, 3)) for batch in view.untrusted.batches(50)])
        flagged = scores > self.threshold
        cost = Cost(seconds=0.5, image_passes=3.0, peak_memory_bytes=0, clean_images=0)
        return Sifted(
            scores=scores,
            flagged=flagged,
            threshold=self.threshold if flagged.any() else math.inf,
            basis="The score is how bright the corner is.",
            cost=cost,
        )


@pytest.fixture(autouse=True)
def corner(monkeypatch: pytest.MonkeyPatch) -> None:
    """List the sifter above, and let plain training take a moment."""
    monkeypatch.setitem(SIFTERS, "corner", Corner)
    monkeypatch.setitem(SAFE_TRAINERS, "plain", PlainTraining)


def picture(path: Path, seed: int, label: int, *, planted: bool = False, side: int = SIDE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 60, (side, side, 3), dtype=np.uint8) + np.uint8(70 * label)
    if planted:
        pixels[-2:, -2:] = 255
    Image.fromarray(pixels).save(path)
    return path


def folder(place: Path, count: int = 60, planted: int = 6) -> Path:
    for number in range(count):
        picture(place / CLASSES[number % 3] / f"p{number:02}.png", number, number % 3)
    for number in range(planted):
        picture(place / "bee" / f"x{number}.png", 1000 + number, number % 3, planted=True)
    return place


def run(*words: object) -> int:
    return main([*map(str, words), "--device", "cpu", "--quiet"])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def record_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return found


def test_planted_files_are_listed_and_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = folder(tmp_path / "set"), tmp_path / "out"
    assert run("sift", data, "--out", out, "--method", "corner") == 1
    assert {path.name for path in out.iterdir()} == {
        "scores.csv", "scores.parquet", "sheet.png", "report.html", "result.json"
    }  # fmt: skip
    table = rows(out / "scores.csv")
    assert list(table[0]) == ["file", "label", "score", "flagged"]
    assert len(table) == 66
    listed = [row["file"] for row in table if row["flagged"] == "true"]
    assert sorted(listed) == [f"bee/x{number}.png" for number in range(6)]
    assert table[0]["flagged"] == "true"
    assert all(row["label"] == row["file"].split("/")[0] for row in table)
    scores = [float(row["score"]) for row in table]
    assert scores == sorted(scores, reverse=True)
    parquet = pq.read_table(out / "scores.parquet").to_pydict()
    assert parquet["file"] == [row["file"] for row in table]
    assert sum(parquet["flagged"]) == 6
    record = record_of(out)
    assert record["sifted"]["listed"] == 6
    assert sorted(record["sifted"]["files"]) == sorted(listed)
    assert (record["method"], record["settings"], record["images"]) == ("corner", {"threshold": 0.9}, 66)
    said = capsys.readouterr().out
    assert "Poisoned images listed. 6 of 66 images look poisoned, all of them in the class" in said
    assert (out / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_listed_is_exit_code_0_and_settings_are_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = folder(tmp_path / "set"), tmp_path / "out"
    assert run("sift", data, "--out", out, "--method=corner", "--threshold", "1.5", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["sifted"]["listed"] == 0
    assert record["sifted"]["threshold"] is None
    assert "No poisoned image was found among 66." in (out / "report.html").read_text(encoding="utf-8")


def test_clean_copies_stand_in_class_folders_and_nothing_is_touched(tmp_path: Path) -> None:
    data = folder(tmp_path / "set")
    (data / "dog").mkdir()  # a class without images keeps its number
    picture(data / "cow" / "deep" / "p02.png", 77, 2)
    before = {path: path.read_bytes() for path in data.rglob("*.png")}
    left = tmp_path / "new" / "left"
    assert run("sift", data, "--out", tmp_path / "out", "--method", "corner", "--write-clean", left) == 1
    assert {path: path.read_bytes() for path in data.rglob("*.png")} == before
    copies = {path.relative_to(left): path.read_bytes() for path in left.rglob("*.png")}
    expected = {path.relative_to(data): content for path, content in before.items() if not path.name.startswith("x")}
    assert copies == expected
    assert sorted(path.name for path in left.iterdir()) == ["ant", "bee", "cow", "dog"]
    assert record_of(tmp_path / "out")["clean"] == {"folder": str(left), "as": "copies", "images": 61}
    assert list(left.parent.iterdir()) == [left]
    assert load_source(str(left)).train.class_names == ("ant", "bee", "cow", "dog")


def test_a_list_in_place_of_copies(tmp_path: Path) -> None:
    data, left = folder(tmp_path / "set"), tmp_path / "left"
    left.mkdir()
    words = ("--method", "corner", "--write-clean", left, "--write-clean-as", "list")
    assert run("sift", data, "--out", tmp_path / "out", *words) == 1
    names = (left / "clean.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) == 60
    assert not [name for name in names if "/x" in name]
    assert (data / names[0]).is_file()


def arrays(path: Path, data: Path) -> Path:
    source = load_source(str(data))
    images = source.train.images.permute(0, 2, 3, 1).numpy()  # type: ignore[union-attr]
    np.savez(path, train_images=images, train_labels=source.train.labels.numpy(), class_names=np.array(CLASSES),
             test_images=images[:12], test_labels=source.train.labels.numpy()[:12])  # fmt: skip
    return path


def test_arrays_are_named_by_their_place_and_written_as_arrays(tmp_path: Path) -> None:
    file = arrays(tmp_path / "set.npz", folder(tmp_path / "set"))
    left = tmp_path / "left"
    assert run("sift", file, "--out", tmp_path / "out", "--method", "corner", "--write-clean", left) == 1
    table = rows(tmp_path / "out" / "scores.csv")
    given = load_source(str(file)).train
    for row in table:
        assert CLASSES[int(given.labels[int(row["file"])])] == row["label"]
    source = load_source(str(left / "clean.npz"))
    assert len(source.train) == 60
    assert source.test is not None
    kept = sorted(int(row["file"]) for row in table if row["flagged"] == "false")
    assert torch.equal(source.train.images, given.images[kept])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("full", "is not empty"),
        ("set/left", "is inside the data folder"),
        ("set", "is inside the data folder"),
        ("link/left", "is inside the data folder"),
        ("file", "this is a file"),
    ],
)
def test_places_for_what_is_left_are_refused_before_any_work(
    tmp_path: Path, place: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder(tmp_path / "set")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(data)
    monkeypatch.setattr(Corner, "sift", None)
    words = ("--method", "corner", "--write-clean", tmp_path / place)
    assert run("sift", data, "--out", tmp_path / "out", *words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "--write-clean" in said
    assert run("sift", data, "--out", data / "out", "--method", "corner") == 2
    assert "choose another --out" in capsys.readouterr().err


def test_unreadable_pictures_are_in_every_result(tmp_path: Path) -> None:
    data, out = folder(tmp_path / "set"), tmp_path / "out"
    (data / "ant" / "broken.png").write_bytes(b"\x89PNG nothing")
    (data / "cow" / "cut.png").write_bytes((data / "cow" / "p02.png").read_bytes()[:150])
    left = tmp_path / "left"
    assert run("sift", data, "--out", out, "--method", "corner", "--write-clean", left) == 1
    table = rows(out / "scores.csv")
    assert table[-2:] == [
        {"file": "ant/broken.png", "label": "ant", "score": "", "flagged": ""},
        {"file": "cow/cut.png", "label": "cow", "score": "", "flagged": ""},
    ]
    assert pq.read_table(out / "scores.parquet").to_pydict()["score"][-2:] == [None, None]
    assert [entry["file"] for entry in record_of(out)["unreadable"]] == ["ant/broken.png", "cow/cut.png"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "2 pictures could not be read" in page
    assert "cow/cut.png" in page
    assert len(list(left.rglob("*.png"))) == 60


def test_names_obey_nobody(tmp_path: Path) -> None:
    data, out = tmp_path / "set", tmp_path / "out"
    folder(data)
    os.rename(data / "bee" / "x0.png", data / "bee" / "=1+1.png")
    os.rename(data / "bee", data / "=bee\n,\u202e")
    words = ("--method", "corner", "--write-clean", tmp_path / "left")
    assert run("sift", data, "--out", out, *words) == 1
    text = (out / "scores.csv").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 67
    assert "\u202e" not in text
    assert all(not line.startswith(("=", "+", "-", "@")) for line in text.splitlines())
    exact = pq.read_table(out / "scores.parquet").to_pydict()
    assert "=bee\n,\u202e/=1+1.png" in exact["file"]
    for text, safe in (("+1", "'+1"), ("@x", "'@x"), (" =x", "' =x"), ("a=b", "a=b"), ("'x", "''x"), ("-", "'-")):
        assert csv_text(text) == safe


def test_names_of_classes_that_make_no_folders_become_numbers(tmp_path: Path) -> None:
    for names in (("../up", "a"), ("a", "A"), (".hidden", "b"), ("b", "a"), ("", "b"), ("x" * 300, "y")):
        assert class_folders(names) == ["class-0", "class-1"]
    data = tmp_path / "set"
    for number in range(40):
        picture(data / f"{number}.png", number, number % 2, planted=number > 36)
    lines = [f"{number}.png,{('../../up', 'a/b')[number % 2]}" for number in range(40)]
    (data / "labels.csv").write_text("\n".join(["file,label", *lines]), encoding="utf-8")
    left = tmp_path / "left"
    words = ("--method", "corner", "--write-clean", left)
    assert run("sift", data / "labels.csv", "--out", tmp_path / "out", *words) == 1
    assert sorted(path.name for path in left.iterdir()) == ["class-0", "class-1"]
    assert len(list(left.rglob("*.png"))) == 37
    assert not list(tmp_path.glob("up*"))


def test_sets_larger_than_memory_and_pictures_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = folder(tmp_path / "set"), tmp_path / "out"
    picture(data / "ant" / "large.png", 5, 0, side=40)
    assert run("sift", data, "--out", out, "--method", "corner") == 2
    assert "--image-size" in capsys.readouterr().err
    monkeypatch.setenv("LUSTRAL_MEMORY", "2.6e-5")  # 27,917 bytes for 28,944
    assert run("sift", data, "--out", out, "--method", "corner", "--image-size", "12") == 1
    assert record_of(out)["image_shape"] == [3, 12, 12]
    assert record_of(out)["images"] == 67


def clean_folder(place: Path, own: Sequence[Path] = ()) -> Path:
    for number in range(12):
        picture(place / CLASSES[number % 3] / f"c{number}.png", 500 + number, number % 3)
    for path in own:
        (place / path.parent.name / f"own-{path.name}").write_bytes(path.read_bytes())
    return place


def test_a_clean_set_that_overlaps_is_refused_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "set")
    good = clean_folder(tmp_path / "good")
    assert run("sift", data, "--out", tmp_path / "out", "--method", "corner", "--clean", good) == 1
    assert record_of(tmp_path / "out")["clean_images"] == 12
    bad = clean_folder(tmp_path / "bad", [data / "ant" / "p03.png", data / "cow" / "p05.png"])
    capsys.readouterr()
    assert run("sift", data, "--out", tmp_path / "out", "--method", "corner", "--clean", bad) == 2
    said = capsys.readouterr().err
    assert "2 images of the untrusted set are in the clean set too (ant/p03.png, cow/p05.png)" in said


def test_a_clean_set_may_have_fewer_classes_and_no_strangers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, some = folder(tmp_path / "set"), clean_folder(tmp_path / "some")
    for path in (some / "ant").iterdir():
        path.unlink()
    (some / "ant").rmdir()
    assert run("sift", data, "--out", tmp_path / "out", "--method", "corner", "--clean", some) == 1
    os.rename(some / "bee", some / "wasp")
    capsys.readouterr()
    assert run("sift", data, "--out", tmp_path / "out", "--method", "corner", "--clean", some) == 2
    assert "'wasp'" in capsys.readouterr().err


def test_a_number_of_clean_images_is_for_known_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "set")
    assert run("sift", data, "--out", tmp_path / "out", "--method", "corner", "--clean", "5") == 2
    assert "nobody knows which of your own images are clean" in capsys.readouterr().err
    words = ("--method", "corner", "--clean", "40", "--image-size", "8", "--threshold", "2")
    assert run("sift", "digits", "--out", tmp_path / "digits", *words) == 0
    record = record_of(tmp_path / "digits")
    assert record["images"] == 1437 - 287
    assert 35 <= record["clean_images"] <= 40
    assert record["flip"] is False


@pytest.mark.parametrize(
    ("count", "words", "message"),
    [(21, (), "has 21 images; Corner expects at least 30"), (60, ("--method", "nobody"), "unknown sifter 'nobody'")],
)
def test_bad_lines_end_with_2(
    tmp_path: Path, count: int, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path / "set", count, planted=0)
    assert run("sift", data, "--out", tmp_path / "out", *(words or ("--method", "corner"))) == 2
    assert message in capsys.readouterr().err


def test_one_class_is_refused_and_an_image_alone_in_its_class_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path / "set", planted=0)
    picture(data / "dog" / "only.png", 3, 1, planted=True)
    assert run("sift", data, "--out", tmp_path / "out", "--method", "corner") == 0
    assert "One image only in class dog: there is nothing to compare it with, so it is kept." in capsys.readouterr().out
    one = tmp_path / "one"
    (one / "bee").mkdir(parents=True)
    for number in range(40):
        picture(one / "ant" / f"{number}.png", number, 1)
    assert run("sift", one, "--out", tmp_path / "out", "--method", "corner") == 2
    assert "all 40 images of the untrusted set have the label ant" in capsys.readouterr().err


def test_training_writes_a_model_that_opens_and_tells_its_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = folder(tmp_path / "set", count=120, planted=0), tmp_path / "out"
    test = folder(tmp_path / "test", count=30, planted=0)
    words = ("--method", "plain", "--epochs", "6", "--batch-size", "20", "--test", test)
    assert run("train", data, "--out", out, *words) == 0
    record = record_of(out)
    assert record["settings"]["trainer"]["epochs"] == 6
    assert record["settings"]["trainer"]["learning_rate"] == 0.1  # of the recipe for a small set, not the class
    assert record["accuracy"]["value"] > 0.9
    assert len(record["history"]) == 6
    loaded = load_model(out / "model.safetensors", num_classes=3, image_shape=(3, SIDE, SIDE))
    assert loaded.arch == "small_cnn"
    assert "Accuracy on the test set" in capsys.readouterr().out
    assert "it was learnt too" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", ["sift", "train"])
def test_the_list_explains_each_method(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--list", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert list(methods) == list(SIFTERS if verb == "sift" else SAFE_TRAINERS)
    assert all(entry["does"] and entry["needs"] and entry["passes"] > 0 for entry in methods.values())
    assert main([verb, "--list"]) == 0
    assert "needs" in capsys.readouterr().out


def test_the_flags_of_a_recipe_follow_the_set(tmp_path: Path) -> None:
    line = ["train", "data", "--out", "o", "--method", "plain", "--epochs", "3"]
    parsed = parse_untrusted(line, Trainer(epochs=9, batch_size=7))
    assert isinstance(parsed, Train)
    assert (parsed.settings.trainer.epochs, parsed.settings.trainer.batch_size) == (3, 7)
    assert parse_untrusted(line[:-2], Trainer(epochs=9)).settings.trainer is None
    first = parse(["sift", "data", "--out", "o"])
    assert isinstance(first, Sift)
    assert first.method == ("combined" if "combined" in SIFTERS else next(iter(SIFTERS)))
    with pytest.raises(UsageError, match="--out"):
        parse(["sift", "data"])


def test_long_work_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder(tmp_path / "set")
    monkeypatch.setattr(Corner, "cost_passes", 1e9)
    assert main(["sift", str(data), "--out", str(tmp_path / "out"), "--method", "corner", "--device", "cpu"]) == 1
    assert "This takes about" in capsys.readouterr().err
    assert record_of(tmp_path / "out")["expected_seconds"] > 60
    assert run("sift", data, "--out", tmp_path / "out", "--method", "corner") == 1
    assert "This takes about" not in capsys.readouterr().err
