"""Completion in the shell: every command and flag is there, bash runs the script, and it completes."""

from __future__ import annotations

import re
import subprocess
from typing import get_args

import pytest

from lustral.catalog import ATTACKS, PURIFIERS
from lustral.cli import main
from lustral.cli.completion import MOLECULES, SHELLS, Words, bash, flags_of, words
from lustral.cli.molecules import arguments as molecules
from lustral.cli.overview import VERBS

ASK = """
COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_lustral; printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, ...], Words]:
    return words()


def completed(script: str, line: str) -> list[str]:
    """Return what bash offers for the last word of a line."""
    ran = subprocess.run(["bash", "-c", script + ASK.format(line=line)], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    return ran.stdout.split()


def test_bash_completes(found: dict[tuple[str, ...], Words]) -> None:
    script = bash(found)
    assert completed(script, "lustral ''") == [*VERBS, "completion"]
    assert completed(script, "lustral er") == ["erase"]
    assert completed(script, "lustral erase m.pt --method ''") == list(PURIFIERS)
    assert completed(script, "lustral erase m.pt --method sau --da") == ["--data"]
    assert completed(script, "lustral implant wa") == ["wanet"]
    assert set(completed(script, "lustral implant --data ''")) >= {"digits", "cifar10"}
    assert completed(script, "lustral bench run --sh") == ["--shard"]
    assert completed(script, "lustral scan --out ''") == [], "a flag's value completes as files"
    assert completed(script, "lustral molecules gen") == ["generate"]


@pytest.mark.parametrize("line", [("scan",), ("erase",), ("evaluate",), ("bench", "run"), ("bench", "gc"), ("demo",)])
def test_the_flags_are_those_of_the_help(
    line: tuple[str, ...], found: dict[tuple[str, ...], Words], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, "--help"]) == 0
    shown = set(re.findall(r"(?<![\w-])--[\w.-]*\w", capsys.readouterr().out))
    assert set(found[line].flags) <= shown
    top = {flag for flag in shown if "." not in flag}
    assert top - set(found[line].flags) <= {flag for kind in PURIFIERS.values() for flag in flags_of(kind)} | {
        "--epochs"
    }


def test_nothing_is_left_out(found: dict[tuple[str, ...], Words]) -> None:
    assert {path[0] for path in found if path} == {*VERBS, "completion"}
    assert set(ATTACKS) < set(found["implant",].commands)
    assert {kind.__name__.lower() for kind in map(origin, get_args(molecules.Command))} == set(MOLECULES)


def origin(kind: type) -> type:
    return getattr(kind, "__origin__", kind)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].strip("# ").startswith((f"{shell} completion", "compdef lustral"))
    assert all(name in shown for name in PURIFIERS)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "cmd"]) == 2
    assert "bash,zsh,fish" in capsys.readouterr().err
