"""Data sets made to run code, to hang, or to take all memory: each is refused with a reason, before it costs anything."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.EpsImagePlugin
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision.datasets
from PIL import Image

import lustral
from lustral.vision.records import ImageSet
from lustral.vision.sources import SourceError, checks, folder, load_source
from lustral.vision.sources.parquet import declared_pages
from lustral.vision.sources.pixels import FORMATS

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n(%pipe%true) (w) file closefile\nshowpage\n%%EOF\n"


def small_picture(grey: int = 9) -> Image.Image:
    return Image.new("RGB", (4, 4), (grey, 0, 0))


def encoded(picture: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def two_classes(root: Path) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        small_picture().save(root / name / "x.png")
    return root


def set_in(path: Path, **settings: Any) -> ImageSet:
    train = load_source(str(path), **settings).train
    assert isinstance(train, ImageSet)
    return train


@pytest.fixture
def no_ghostscript(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def note(*_: Any, **__: Any) -> None:
        calls.append("run")
        raise OSError("Ghostscript would have run")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", note)
    return calls


# --- formats ---


def test_no_picture_is_opened_without_the_list_of_formats() -> None:
    source = Path(lustral.__file__).parent
    for path in source.rglob("*.py"):
        for call in re.findall(r"Image\.open\([^\n]*", path.read_text(encoding="utf-8")):
            assert "formats=FORMATS" in call, path
    assert "EPS" not in FORMATS


def test_postscript_named_as_a_picture_is_never_run(tmp_path: Path, no_ghostscript: list[str]) -> None:
    (two_classes(tmp_path) / "b" / "y.png").write_bytes(EPS)
    for stream in (False, True):
        with pytest.raises(SourceError, match=r"y\.png: unreadable image \(cannot identify"):
            load_source(str(tmp_path), image_size=4, stream=stream)
    assert no_ghostscript == []


def test_postscript_in_a_table_is_never_run(tmp_path: Path, no_ghostscript: list[str]) -> None:
    pq.write_table(pa.table({"png": [encoded(small_picture()), EPS], "label": [0, 1]}), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match="row 1: unreadable image"):
        load_source(str(tmp_path / "t.parquet"), image_size=4)
    assert no_ghostscript == []


class FromDisk(torchvision.datasets.VisionDataset):  # type: ignore[misc]
    """Reads the picture x.png in its folder, as torchvision's sets do."""

    def __init__(self, root: str, train: bool = True) -> None:
        super().__init__(root)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(Path(self.root) / "x.png").convert("RGB"), index


def test_torchvision_reads_no_postscript_and_no_pipe(
    tmp_path: Path, no_ghostscript: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FromDisk)
    path = tmp_path / "x.png"
    path.write_bytes(EPS)
    with pytest.raises(SourceError, match="cannot open it"):
        load_source("torchvision:CIFAR10", root=tmp_path)
    assert no_ghostscript == []
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SourceError, match="expected a regular file"):
        load_source("torchvision:CIFAR10", root=tmp_path)
    path.unlink()
    small_picture().save(path)
    assert len(load_source("torchvision:CIFAR10", root=tmp_path).train) == 2
    assert Image.open.__module__ == "PIL.Image"
    assert not hasattr(Image.open, "__wrapped__")


@pytest.mark.parametrize("kind", ["GIF", "ICO", "TGA", "SGI", "PCX"])
def test_formats_beyond_the_list_are_refused(tmp_path: Path, kind: str) -> None:
    (two_classes(tmp_path) / "b" / "y.png").write_bytes(encoded(small_picture(), kind))
    with pytest.raises(SourceError, match=r"expected 8-bit BMP, JPEG, PNG, PPM, TIFF, WEBP"):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    ("suffix", "mode"), [("tif", "RGB"), ("TIFF", "L"), ("pgm", "L"), ("pbm", "1"), ("ppm", "RGB")]
)
def test_tiff_and_the_netpbm_formats_are_read(tmp_path: Path, suffix: str, mode: str) -> None:
    picture = Image.new("L", (4, 4), 255).convert(mode)
    picture.save(two_classes(tmp_path) / "b" / f"y.{suffix}")
    assert set_in(tmp_path).images[2].unique().tolist() == [255]


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"save_all": True, "append_images": [small_picture(99)] * 3}
    settings |= {"lossless": True} if kind == "WEBP" else {}
    (two_classes(tmp_path) / "b" / "y.png").write_bytes(encoded(small_picture(), kind, **settings))
    assert set_in(tmp_path).images[2, 0].unique().tolist() == [9]


@pytest.mark.parametrize(("mode", "expected"), [("CMYK", 9), ("L", 2), ("LA", 2), ("RGBA", 9), ("1", 0)])
def test_every_8_bit_kind_becomes_rgb(tmp_path: Path, mode: str, expected: int) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    (two_classes(tmp_path) / "b" / "y.png").write_bytes(encoded(small_picture().convert(mode), kind))
    assert abs(int(set_in(tmp_path).images[2, 0, 0, 0]) - expected) <= 1


def test_what_torchvision_ignores_is_ignored_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two_classes(tmp_path)
    wide = Image.new("RGB", (4, 4))
    wide.putpixel((0, 3), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "a" / "y.png").write_bytes(encoded(wide, exif=exif))
    (tmp_path / "b" / "y.png").write_bytes(encoded(Image.new("RGBA", (4, 4), (50, 60, 70, 0))))
    train = set_in(tmp_path)
    loader = torchvision.datasets.folder.default_loader
    for row, name in ((1, "a"), (3, "b")):
        expected = np.asarray(loader(tmp_path / name / "y.png")).transpose(2, 0, 1)
        assert np.array_equal(train.images[row].numpy(), expected)
    assert "1 pictures are stored turned" in caplog.text
    assert "1 pictures have transparency" in caplog.text


# --- what is no regular file ---


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have few characters
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, make_socket, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name)],
    ids=["pipe", "socket", "device", "loop"],
)
@pytest.mark.parametrize("name", ["y.png", "y.npz", "y.parquet"])
def test_pipes_sockets_devices_and_loops_never_hang(tmp_path: Path, make: Callable[[Path], None], name: str) -> None:
    place = two_classes(tmp_path) / "b" / name
    make(place)
    spec = tmp_path if name == "y.png" else place
    with pytest.raises(SourceError, match=r"regular file|symbolic links|neither a known name"):
        load_source(str(spec))


def test_folders_that_lead_back_to_themselves_are_entered_once(tmp_path: Path) -> None:
    root = two_classes(tmp_path)
    (root / "a" / "again").symlink_to(root / "a")
    (root / "a" / "all").symlink_to(root)
    (root / "b" / "itself").symlink_to("itself")
    assert set_in(root).labels.tolist() == [0, 0, 1]  # through "all", the picture of b lies below a as well


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    elsewhere = two_classes(tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        (tmp_path / "set" / name).symlink_to(elsewhere / name)
    assert set_in(tmp_path / "set").labels.tolist() == [0, 1]


def test_the_whole_disk_is_no_image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_FEW_ENTRIES", 200)
    root = two_classes(tmp_path)
    for index in range(300):
        (root / "b" / f"{index}.txt").touch()
    with pytest.raises(
        SourceError, match=r"of the first 200 files and folders in it [12] are pictures; this is no image"
    ):
        load_source(str(root))
    with pytest.raises(SourceError, match=r"expected an image folder.* this is a whole disk"):
        load_source("/")


@pytest.mark.parametrize(
    ("limit", "message"), [("MOST_IMAGES", "at most 1 pictures"), ("MOST_CLASSES", "at most 1 class")]
)
def test_folders_have_limits(tmp_path: Path, limit: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, limit, 1)
    with pytest.raises(SourceError, match=message):
        load_source(str(two_classes(tmp_path)))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\u202eb", "[red]"])
def test_class_names_are_kept_as_they_are(tmp_path: Path, name: str) -> None:
    two_classes(tmp_path)
    (tmp_path / name).mkdir()
    assert name in set_in(tmp_path).class_names  # what shows them escapes them


def test_endless_class_names_are_refused(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=[0, 1], class_names=["a", "b" * 1001])
    with pytest.raises(SourceError, match=r"class names of at most 1000 characters; found one of 1,001"):
        load_source(str(tmp_path / "x.npz"))


# --- pictures that unpack to too much ---


def test_pictures_of_13000_pixels_are_refused_by_their_headers(tmp_path: Path) -> None:
    content = encoded(Image.new("1", (13_000, 13_000)))
    two_classes(tmp_path)
    for index in range(20):
        (tmp_path / "b" / f"{index}.png").write_bytes(content)
    with pytest.raises(SourceError, match=r"13000x13000 pixels; expected at most 64,000,000"):
        load_source(str(tmp_path), image_size=4)


def test_small_files_that_unpack_to_too_much_are_refused(tmp_path: Path) -> None:
    content = encoded(Image.new("1", (4000, 4000)))  # 48 MB of pixels in 2 kB, which alone would pass
    two_classes(tmp_path / "set")
    for index in range(20):
        (tmp_path / "set" / "a" / f"{index}.png").write_bytes(content)
    with pytest.raises(SourceError, match="this is no plausible data set"):
        load_source(str(tmp_path / "set"), image_size=4)
    pq.write_table(pa.table({"png": [content] * 20, "label": [0, 1] * 10}), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match="this is no plausible data set"):
        load_source(str(tmp_path / "t.parquet"), image_size=4)


def test_drawings_of_one_bit_a_pixel_are_plausible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "FREE_EXPANSION", 1)
    two_classes(tmp_path)
    drawing = Image.new("1", (105, 105))
    for step in range(5, 100):  # as Omniglot has them
        drawing.putpixel((step, 50 + step % 7), 1)
        drawing.putpixel((30 + step % 3, step), 1)
    for index in range(20):
        drawing.save(tmp_path / "a" / f"{index}.png")
    assert len(load_source(str(tmp_path), image_size=105).train) == 22


def test_pictures_must_fit_the_memory_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_classes(tmp_path)
    monkeypatch.setenv("LUSTRAL_MEMORY", "0.001")
    assert len(load_source(str(tmp_path)).train) == 2
    with pytest.raises(SourceError, match=r"take 0\.01 GiB in memory, .* set LUSTRAL_MEMORY to the GiB"):
        load_source(str(tmp_path), image_size=1000)
    with pytest.raises(SourceError, match="LUSTRAL_MEMORY"):
        load_source("digits", image_size=1000)
    assert load_source(str(tmp_path), image_size=1000, stream=True).train.image_shape == (3, 1000, 1000)
    monkeypatch.setenv("LUSTRAL_MEMORY", "much")
    with pytest.raises(SourceError, match="expected a positive number of GiB, such as 16; got 'much'"):
        load_source(str(tmp_path))


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a small PNG with more chunks after its header."""
    content = encoded(small_picture())
    extra = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return content[:33] + extra + content[33:]


@pytest.mark.parametrize(
    ("kind", "start"),
    [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"icc\0\0")],
    ids=["text", "utf8", "icc"],
)
def test_chunks_that_unpack_to_much_cost_nothing(tmp_path: Path, kind: bytes, start: bytes) -> None:
    bomb = start + zlib.compress(bytes(10_000_000))
    (two_classes(tmp_path) / "b" / "y.png").write_bytes(png_with(*[(kind, bomb)] * 20))
    with contextlib.suppress(SourceError):  # Pillow may read past them, or refuse the picture
        assert set_in(tmp_path).images[2, 0].unique().tolist() == [9]


def test_a_narrow_picture_is_not_blown_up(tmp_path: Path) -> None:
    Image.new("L", (1, 60_000)).save(two_classes(tmp_path) / "b" / "y.png")
    with pytest.raises(SourceError, match="too narrow to resize the shorter side to 256"):
        load_source(str(tmp_path), image_size=224, resize=256)


# --- archives ---


def array_file(shape: tuple[int, ...], content: bytes, dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def archive(path: Path, **members: bytes) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return str(path)


IMAGES = array_file((2, 4, 4), bytes(32))
LABELS = array_file((2,), bytes([0, 1]))


def test_only_wanted_arrays_are_read(tmp_path: Path) -> None:
    spec = archive(tmp_path / "x.npz", images=IMAGES, labels=LABELS, more=array_file((2**32,), b""), code=b"garbage")
    assert len(load_source(spec).train) == 2


@pytest.mark.parametrize("shape", [(2**34, 4, 4), (3, 4, 4), (-2, -4, 4), (2**62, 2**62, 4)])
def test_an_array_must_be_as_large_as_it_says(tmp_path: Path, shape: tuple[int, ...]) -> None:
    spec = archive(tmp_path / "x.npz", images=array_file(shape, bytes(32)), labels=LABELS)
    with pytest.raises(SourceError, match=r"declares .* bytes and has 32"):
        load_source(spec)


def test_a_deflated_bomb_is_refused_before_it_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "FREE_EXPANSION", 1_000_000)
    spec = archive(tmp_path / "x.npz", images=array_file((2, 2000, 1000), bytes(4_000_000)), labels=LABELS)
    with pytest.raises(SourceError, match=r"images: .* bytes that unpack to 4,000,128"):
        load_source(spec)
    monkeypatch.setenv("LUSTRAL_MEMORY", "0.001")
    with pytest.raises(SourceError, match=r"more than the 0\.001 GiB allowed"):
        load_source(spec)


def test_labels_of_a_thousand_million_are_refused(tmp_path: Path) -> None:
    labels = np.array([0, 10**9])
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), dtype=np.uint8), labels=labels)
    pq.write_table(pa.table({"png": [encoded(small_picture())] * 2, "label": labels}), tmp_path / "x.parquet")
    for suffix in ("npz", "parquet"):
        with pytest.raises(SourceError, match="at most 100,000 classes, so labels below that; found 1000000000"):
            load_source(str(tmp_path / f"x.{suffix}"))


def test_track_numbers_may_be_anything(tmp_path: Path) -> None:
    images, tracks = np.zeros((4, 4, 4), dtype=np.uint8), np.array([7, 2**62, 7, 7])
    np.savez(
        tmp_path / "x.npz",
        images=images,
        labels=[0, 0, 1, 1],
        train_labels=[0, 0, 1, 1],
        train_images=images,
        train_track=tracks,
    )
    groups = load_source(str(tmp_path / "x.npz")).groups
    assert groups is not None
    assert [int((groups == group).sum()) for group in groups] == [1, 1, 2, 2]


# --- tables ---


def write(path: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


PNG = encoded(small_picture())


def test_one_picture_a_million_times_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    count = 1_000_000
    cells = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(count, dtype=np.int32)), pa.array([encoded(Image.new("1", (1000, 1000)))])
    )
    spec = write(tmp_path / "x.parquet", png=cells, label=np.zeros(count, dtype=np.int8))
    assert Path(spec).stat().st_size < 100_000
    with pytest.raises(SourceError, match=r"take 2,793\.97 GiB in memory"):
        load_source(spec)
    with pytest.raises(SourceError, match="this is no plausible data set"):
        load_source(spec, image_size=1)


def test_pages_that_unpack_to_much_are_refused_by_their_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "FREE_EXPANSION", 1_000_000)
    table = pa.table({"png": [PNG, bytes(8_000_000)], "label": [0, 1]})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(SourceError, match=r"png: [\d,]+ bytes that unpack to 8,"):
        load_source(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_pages_are_found_as_the_footer_counts_them(tmp_path: Path, version: str, compression: str) -> None:
    path = tmp_path / "x.parquet"
    cells = [bytes([index % 251]) * 700 for index in range(4000)]
    table = pa.table({"png": cells, "label": list(range(4000))})
    pq.write_table(
        table, path, data_page_version=version, compression=compression, data_page_size=50_000, row_group_size=1500
    )
    with path.open("rb") as file:
        metadata = pq.ParquetFile(file).metadata
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(0)
            starts = [start for start in (chunk.data_page_offset, chunk.dictionary_page_offset) if start]
            pages = declared_pages(file, min(starts), chunk.total_compressed_size)
            assert len(pages) > 1
            assert 0 < chunk.total_uncompressed_size - sum(pages) < 5000 * len(pages)  # which counts the headers too


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"png": [[PNG], [PNG]], "label": [0, 1]}, "expected encoded pictures in png, as bytes or as records"),
        ({"png": ["a", "b"], "label": [0, 1]}, "expected encoded pictures in png"),
        ({"png": [{"path": "x"}, {"path": "y"}], "label": [0, 1]}, "expected encoded pictures in png"),
        ({"png": [PNG, PNG], "label": [[0], [1]]}, "expected 2 integer labels in label; got list"),
        ({"png": [PNG, PNG], "label": [0, None]}, "expected a label in every row"),
        ({"png": [PNG, PNG], "label": [0, 1], "split": [1, 2]}, "expected texts in split"),
        ({"png": [PNG, PNG], "label": [0, 1], "split": ["train", "x" * 1000]}, "found a long one"),
        ({"png": [PNG, PNG], "label": [0, 1], "split": ["train", None]}, "found 'None'"),
        ({"png": [{"bytes": PNG}, {"bytes": None}], "label": [0, 1]}, "row 1: unreadable image"),
        ({"png": [{"bytes": PNG}, None], "label": [0, 1]}, "row 1: unreadable image"),
    ],
)
def test_odd_columns_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_source(write(tmp_path / "x.parquet", **columns))


def test_dictionaries_and_large_types_are_read(tmp_path: Path) -> None:
    other = encoded(small_picture(50))
    cells = [PNG, other, PNG]
    for picture in (pa.array(cells).dictionary_encode(), pa.array(cells, pa.large_binary())):
        labels = pa.array([1, 0, 1], pa.uint16()).dictionary_encode()
        split = pa.array(["train", "train", "train"]).dictionary_encode()
        train = set_in(Path(write(tmp_path / "x.parquet", png=picture, label=labels, split=split)))
        assert train.images[:, 0, 0, 0].tolist() == [9, 50, 9]
        assert train.labels.tolist() == [1, 0, 1]


def test_damaged_tables_never_raise_anything_else(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "x.parquet", png=[PNG] * 8, label=[0, 1] * 4, split=["train"] * 8))
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(150):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            broken[place] = rng.integers(256)
        path.write_bytes(broken)
        with contextlib.suppress(SourceError):
            load_source(str(path), image_size=4)
