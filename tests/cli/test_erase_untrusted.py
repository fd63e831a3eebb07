"""``lustral erase --untrusted``: the training set reaches the purifiers that look at it, and nobody else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch import Generator

from lustral.catalog import PURIFIERS
from lustral.cli import main
from lustral.core.randomness import child
from lustral.core.records import Cost, OnProgress
from lustral.vision.erasing import erase
from lustral.vision.models import save_model
from lustral.vision.records import DefenderView, ImageSet, Purified, Victim
from toy import clean_images, toy_images

SEEN: list[DefenderView] = []


@dataclass(frozen=True, kw_only=True)
class Looker:
    """Look at the training set and change nothing."""

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "the training set"
    cost_passes: ClassVar[float] = 1.0
    takes_untrusted: ClassVar[bool] = True

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        SEEN.append(view)
        cost = Cost(seconds=0.0, image_passes=0.0, peak_memory_bytes=0, clean_images=len(view.clean))
        return Purified(model=view.model, history=(), selected=None, cost=cost)


@pytest.fixture(autouse=True)
def looker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PURIFIERS, "looker", Looker)
    SEEN.clear()


def write(folder: Path, data: ImageSet, names: Sequence[str] = "abcdefg") -> Path:
    for number, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        path = folder / names[label] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path)
    return folder


@pytest.fixture
def words(tmp_path: Path, backdoored: Victim) -> list[str]:
    model = tmp_path / "model.safetensors"
    save_model(model, backdoored.model, arch="small_cnn:width=16", image_shape=(3, 12, 12))  # type: ignore[arg-type]
    clean = write(tmp_path / "clean", clean_images(70))
    line = ["erase", str(model), "--data", str(clean), "--out", str(tmp_path / "out"), "--device", "cpu", "--quiet"]
    return [*line, "--method"]


def test_the_training_set_is_handed_over_with_its_unreadable_pictures_left_out(
    tmp_path: Path, words: list[str]
) -> None:
    data = write(tmp_path / "set", toy_images(84, seed=0))
    (data / "a" / "broken.png").write_text("no picture")
    assert main([*words, "looker", "--untrusted", str(data)]) == 0
    seen = SEEN[0].untrusted
    assert seen is not None
    assert len(seen) == 84
    assert torch.equal(seen.labels, toy_images(84, seed=0).labels.sort().values)
    record = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert record["untrusted"] == str(data)


def test_lines_that_do_not_fit_are_refused(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "set", toy_images(84, seed=0))
    for method, more, message in (
        ("bn_refresh", ["--untrusted", str(data)], "bn_refresh does not look at the training set"),
        ("looker", [], "give it as --untrusted DATA"),
        ("looker", ["--untrusted", str(write(tmp_path / "two", toy_images(84, seed=0), "aabbaab"))], "in 7 classes"),
        ("looker", ["--untrusted", str(tmp_path / "clean")], "70 images of the untrusted set are in the clean set too"),
    ):
        assert main([*words, method, *more]) == 2, method
        assert message in capsys.readouterr().err
    assert not SEEN


def test_a_view_without_the_set_is_refused(backdoored: Victim) -> None:
    view = DefenderView(model=backdoored.model, clean=clean_images(70))
    with pytest.raises(
        ValueError, match=r"Looker looks at the set that the model was trained on, and the view has none"
    ):
        erase(Looker(), view, generator=child(0))
