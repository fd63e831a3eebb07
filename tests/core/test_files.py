import errno
import json
import math
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from lustral.core.files import (
    NotRegularError,
    atomic_write,
    read_regular,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)


def test_writes_new_and_replaces_old(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"one")
    assert path.read_bytes() == b"one"
    write_text_atomic(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü"
    assert list(tmp_path.iterdir()) == [path]


def test_json_turns_numbers_it_lacks_into_null(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"area": math.inf, "rates": (0.5, math.nan), "inner": {"x": [1, None]}})
    expected = {"area": None, "rates": [0.5, None], "inner": {"x": [1, None]}}
    assert json.loads((tmp_path / "a.json").read_text()) == expected


def test_an_error_in_the_block_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines([b"half", "not bytes"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=r"No space left on device; nothing was written to: .*a\.bin") as caught:
        write_bytes_atomic(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing was written to: .*missing/a\.bin"):
        write_bytes_atomic(tmp_path / "missing" / "a.bin", b"new")


def test_errors_about_other_files_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"directory: '.*other'"), atomic_write(tmp_path / "a.bin"):
        (tmp_path / "other").read_bytes()
    assert not list(tmp_path.iterdir())


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_bytes_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    code = """
import os, signal, sys
from lustral.core.files import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_reading_takes_the_memory_of_what_is_there_and_not_of_what_may_be(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 1000)
    tracemalloc.start()
    try:
        assert read_regular(path, most=4 << 30) == b"x" * 1000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(NotRegularError, match="larger than the 999 bytes"):
        read_regular(path, most=999)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs a file that does not tell its size")
def test_a_file_that_does_not_tell_its_size_is_read_whole_or_refused() -> None:
    assert read_regular("/proc/self/status", most=2**20).startswith(b"Name:")
    with pytest.raises(NotRegularError, match="larger than the 10 bytes"):
        read_regular("/proc/self/status", most=10)
