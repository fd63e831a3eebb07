"""What is said when there is no room or no right to write: the place that failed, and the flag that chose it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from bench.test_bench_cli import PLAN
from lustral.cli import main
from lustral.cli.exits import one_line
from lustral.core import files
from lustral.store.store import Store

TROUBLES = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES]


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int) -> None:
    """Make the disk of a folder fail where bytes reach it."""
    fsync = os.fsync

    def fail(number: Any) -> None:
        where = number if isinstance(number, int) else number.fileno()
        if Path(os.readlink(f"/proc/self/fd/{where}")).is_relative_to(folder):
            raise OSError(code, os.strerror(code))
        fsync(number)

    monkeypatch.setattr(files.os, "fsync", fail)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells which file is written")
@pytest.mark.parametrize("code", TROUBLES)
def test_bench_run_names_the_store(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    store = tmp_path / "store"
    Store(str(store)).open(create=True)
    refuse(monkeypatch, store, code)
    assert main(["bench", "run", str(tmp_path / "plan.toml"), "--store", str(store), "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert str(store) in line
    assert os.strerror(code) in line
    assert line.endswith("or choose another --store")
    assert all_files(store) == [store / "store.json"]  # nothing half-written


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells which file is written")
def test_a_full_temporary_folder_is_named_and_is_no_failure_of_the_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    scratch, store = tmp_path / "scratch", tmp_path / "store"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    refuse(monkeypatch, scratch, errno.ENOSPC)
    assert main(["bench", "run", str(tmp_path / "plan.toml"), "--store", str(store), "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert str(scratch) in line
    assert line.endswith("another temporary folder in the environment variable TMPDIR")
    assert Store(str(store)).keys("failures") == set()


@pytest.mark.parametrize("code", TROUBLES)
def test_the_flag_that_chose_the_place_is_named(code: int, tmp_path: Path) -> None:
    def said(path: str, *words: str) -> str:
        return one_line(OSError(code, os.strerror(code), path), words)

    line = ("bench", "run", "plan.toml", "--site", f"{tmp_path}/site", f"--store={tmp_path}/s", "--json")
    assert said(f"{tmp_path}/s/victims/x.json", *line).endswith("or choose another --store")
    assert said(f"{tmp_path}/site/index.html", *line).endswith("or choose another --site")
    assert said("/elsewhere/x", *line).endswith("or name another place")


def test_a_place_is_named_where_the_system_names_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: BinaryIO | int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    for write in (files.write_bytes_atomic, files.write_bytes_once):
        with pytest.raises(OSError, match="nothing was written to") as caught:
            write(tmp_path / "a", b"x")
        assert caught.value.filename == str(tmp_path / "a")
    assert all_files(tmp_path) == []
