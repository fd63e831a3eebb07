"""The first look at the command line: quick, and word for word what the commands say of themselves."""

from __future__ import annotations

import inspect
import resource
import subprocess
import sys
from typing import Any, get_args

import pytest

from lustral.cli import main
from lustral.cli.arguments import Command
from lustral.cli.overview import ABOUT, VERBS
from lustral.cli.parsing import DESCRIPTIONS

MOST_SECONDS = 1.0  # of processor time; 0.2 on this project's machine


def test_the_lines_are_those_of_the_commands() -> None:
    kinds: list[Any] = [getattr(kind, "__origin__", kind) for kind in get_args(Command)]
    said = {kind.__name__.lower(): inspect.getdoc(kind).partition("\n\n")[0].replace("\n", " ") for kind in kinds}
    assert said | {"bench": DESCRIPTIONS["lustral bench"]} == VERBS
    assert DESCRIPTIONS["lustral"] == ABOUT


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_first_look_names_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(verb in out for verb in VERBS)


def test_the_first_look_is_quick() -> None:
    code = "import sys; from lustral.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MOST_SECONDS
