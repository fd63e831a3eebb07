"""What every command line of ours shares: common flags, and ``tyro`` with our kind of error. Imports no torch."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from lustral.cli.exits import HelpShown

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
FLAT = tyro.conf.arg(name="")  # the fields become flags without a prefix
DESCRIPTIONS = {
    "lustral": "Find, show and erase backdoors in image classifiers.",
    "lustral molecules": "Find, show and erase backdoors in text-guided molecule generation. It needs more libraries: "
    "pip install 'lustral[molecules]'",
    "lustral bench": "Run a plan of attacks and defences, and show what came out.",
}
BOX = "╭╮╰╯│─"  # what tyro draws around its messages


class UsageError(ValueError):
    """The command line cannot be understood."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """Flags of every command.

    Attributes:
        seed: every random draw derives from it; equal seeds repeat a run exactly on one device.
        device: "auto" takes a GPU where there is one; or "cpu", "cuda", "cuda:1".
        json: print one JSON object on standard output and nothing else there.
        quiet: show no progress, and no pictures in a terminal with colours; NO_COLOR leaves out the pictures too.
        debug: show the traceback of an error.
    """

    seed: int = 0
    device: str = "auto"
    json: Switch = False
    quiet: Switch = False
    debug: Switch = False


def run_tyro(kind: Any, argv: list[str], *, prog: str = "lustral", **options: Any) -> Any:
    """Call ``tyro.cli``.

    Raises:
        UsageError: the line cannot be understood; the message is one line.
        HelpShown: it asked for help, which has been printed.
    """
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                kind,
                args=argv,
                prog=prog,
                description=DESCRIPTIONS.get(prog),
                config=(tyro.conf.CascadeSubcommandArgs,),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:
            raise HelpShown from None
        lines = (line.strip(BOX + " ") for line in captured.getvalue().splitlines()[1:])
        message = " ".join(line for line in lines if line.strip("-+| "))  # boxes of terminals without box characters
        raise UsageError(re.sub(r"Error parsing \S*__\S*: ", "", message)) from None  # a name of tyro's own
