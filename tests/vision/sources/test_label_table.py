"""Label tables, and pictures that cannot be read: what is refused, what is left out, what is listed."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lustral.core import limits
from lustral.vision.records import ImageSet
from lustral.vision.sources import FolderStream, SourceError, label_table, load_source


def picture(path: Path, seed: int, side: int = 6) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def table(folder: Path, *rows: str, header: str = "file,label") -> str:
    for number, row in enumerate(rows):
        name = row.split(",")[0]
        if "/" not in name and name.endswith(".png") and not (folder / name).exists():
            picture(folder / name, number)
    (folder / "labels.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return str(folder / "labels.csv")


def test_names_of_classes_are_numbered_as_sorted(tmp_path: Path) -> None:
    source = load_source(table(tmp_path, "x.png,wolf", "y.png,ant", "z.png,wolf"))
    assert isinstance(source.train, ImageSet)
    assert source.train.class_names == ("ant", "wolf")
    assert source.train.labels.tolist() == [1, 0, 1]
    assert source.files == tuple(str(tmp_path / name) for name in ("x.png", "y.png", "z.png"))
    assert (source.name, source.folder) == ("labels", str(tmp_path))
    assert np.array_equal(source.train.images[1].numpy(), np.asarray(Image.open(tmp_path / "y.png")).transpose(2, 0, 1))


def test_numbers_are_the_classes_and_columns_stand_in_any_order(tmp_path: Path) -> None:
    source = load_source(
        table(
            tmp_path,
            *(f"{n}.png,{label},x,{split}" for n, label, split in ((0, 3, "train"), (1, 0, "train"), (2, 1, "test"))),
            header="file,LABEL,source,split",
        )
    )
    assert source.train.num_classes == 4
    assert source.train.labels.tolist() == [3, 0]
    assert source.test is not None
    assert source.test.labels.tolist() == [1]


def test_a_table_is_streamed_and_framed_like_a_folder(tmp_path: Path) -> None:
    picture(tmp_path / "sub" / "large.png", 1, side=20)
    source = load_source(table(tmp_path, "a.png,0", "sub/large.png,1"), stream=True, image_size=8)
    assert isinstance(source.train, FolderStream)
    assert next(iter(source.train.batches(2))).inputs.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("file", ["../out.png", "/etc/out.png", "sub/../../out.png", "link/out.png", "link.png"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    picture(tmp_path / "out.png", 0)
    (folder / "link").symlink_to(tmp_path)
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(SourceError, match="leads out of the table's folder"):
        load_source(table(folder, "a.png,0", f"{file},1"))


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (("a.png,0",), "path,label", "columns file,label.*found 'path', 'label'"),
        (("a.png,0",), "file,file", "columns file,label"),
        ((), "file,label", "no rows"),
        (("a.png,0", "b.png"), "file,label", "line 3: expected 2 cells; found 1"),
        (("a.png,0", "b.png,"), "file,label", "row 2 has no label"),
        (("a.png,0", "a.png,1"), "file,label", "is there twice"),
        (("a.png,0", "./a.png,1"), "file,label", "is there twice"),
        (("a.png,x", "b.png,x"), "file,label", "all rows have the label 'x'"),
        (("a.png,0", "b.png,99999999999999999999999"), "file,label", "expected labels below 100,000"),
        (("a.png,0", "notes.txt,1"), "file,label", "expected the name of a picture"),
        (("a.png,0", "b\0.png,1"), "file,label", "expected the name of a picture|cannot be read as CSV"),
        (("a.png,0", '"b.png,1'), "file,label", "cannot be read as CSV"),
        (("a.png,0,test", "b.png,1,dev"), "file,label,split", "expected a split train.*found 'dev'"),
        (("a.png,0,test", "b.png,1,test"), "file,label,split", "no rows of split train"),
        (("a.png,0", "gone.jpg,1"), "file,label", "images that cannot be used"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, rows: tuple[str, ...], header: str, message: str) -> None:
    for number, name in enumerate(("a.png", "b.png")):
        picture(tmp_path / name, number)
    (tmp_path / "labels.csv").write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    with pytest.raises(SourceError, match=message):
        load_source(str(tmp_path / "labels.csv"))


def test_other_bytes_than_text_and_tables_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "labels.csv").write_bytes(b"file,label\n\xff\xfe,1\n")
    with pytest.raises(SourceError, match="expected a table in UTF-8; byte 11 is none"):
        load_source(str(tmp_path / "labels.csv"))
    monkeypatch.setattr(label_table, "LARGEST_TABLE", 4)
    with pytest.raises(SourceError, match="is larger than the 4 bytes"):
        load_source(str(tmp_path / "labels.csv"))
    assert limits.LARGEST_TABLE > 4
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(SourceError, match=r"no data set|no regular file"):
        load_source(str(tmp_path / "pipe.csv"))


def spoiled(tmp_path: Path) -> Path:
    """Return a folder of ten pictures, one of which is text, one cut off, one gone."""
    folder = tmp_path / "set"
    for number in range(10):
        picture(folder / ("ant" if number < 5 else "bee") / f"{number}.png", number, side=24)
    (folder / "ant" / "2.png").write_text("no picture")
    whole = (folder / "bee" / "7.png").read_bytes()
    (folder / "bee" / "7.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bee" / "9.png").unlink()
    (folder / "bee" / "9.png").symlink_to(tmp_path / "nowhere.png")
    return folder


@pytest.mark.parametrize("stream", [None, True, False])
def test_unreadable_pictures_are_left_out_and_listed(tmp_path: Path, stream: bool | None) -> None:
    folder = spoiled(tmp_path)
    with pytest.raises(SourceError, match="images that cannot be used"):
        load_source(str(folder))
    source = load_source(str(folder), stream=stream, skip_unreadable=True)
    assert isinstance(source.train, FolderStream if stream else ImageSet)
    broken = {Path(entry.file).name: (entry.label, entry.problem) for entry in source.unreadable}
    assert sorted(broken) == ["2.png", "7.png", "9.png"]
    assert [broken[name][0] for name in sorted(broken)] == [0, 1, 1]
    assert all("unreadable image" in problem for _, problem in broken.values())
    assert [Path(file).name for file in source.files] == ["0.png", "1.png", "3.png", "4.png", "5.png", "6.png", "8.png"]
    assert source.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    for file, image in zip(source.files, next(iter(source.train.batches(7))).inputs, strict=True):
        assert torch.equal(image.mul(255).round().byte(), torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1))


def test_a_set_larger_than_memory_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = spoiled(tmp_path)
    monkeypatch.setenv(limits.MEMORY_VARIABLE, "1e-6")  # 1,073 bytes
    source = load_source(str(folder), stream=None, skip_unreadable=True)
    assert isinstance(source.train, FolderStream)
    assert len(source.train) == 7
    with pytest.raises(SourceError, match="GiB allowed"):
        load_source(str(folder), stream=False, skip_unreadable=True)


def test_nothing_readable_at_all_is_an_error(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_text("no picture")
    with pytest.raises(
        SourceError, match=r"none of the 2 images can be read, the first one: .*x.png: unreadable image"
    ):
        load_source(str(tmp_path), stream=None, skip_unreadable=True)
