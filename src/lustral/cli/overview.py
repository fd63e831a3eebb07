"""What ``lustral --help`` says: the commands, in a line each. Imports no torch, so that the first look takes no seconds.

A test holds the lines against the docstrings that ``tyro`` shows.
"""

from __future__ import annotations

from rich.panel import Panel
from rich.table import Table

from lustral.cli.console import Screen

ABOUT = "Find, show and erase backdoors in image classifiers."
VERBS = {
    "demo": "Run the whole story on embedded digits: implant a backdoor, find it, erase it, measure, show.",
    "scan": "Look for a backdoor. Exit code 0: none found, 1: backdoored, 2: error, 3: cannot tell.",
    "erase": "Erase a backdoor. The help lists the settings of the --method that is named beside it; the last part of a "
    "setting's name is enough: --epochs for --trainer.epochs.",
    "sift": "List the suspicious images of a training set. Exit code 0: none listed, 1: poisoned images listed, 2: error.",
    "train": "Train a model on a set of unknown origin without learning its backdoor.",
    "evaluate": "Measure a victim with its true trigger, and an erased model beside it.",
    "report": "Render the page of a scan or an erasure again from its result.json.",
    "implant": "Train a backdoored model, for experiments.",
    "molecules": "Find, show and erase backdoors in text-guided molecule generation; `lustral molecules --help` lists its "
    "commands.",
    "bench": "Run a plan of attacks and defences, and show what came out.",
}


def show_overview(screen: Screen) -> None:
    """Print the commands."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    for verb, line in VERBS.items():
        table.add_row(verb, line)
    screen.show(
        f"usage: lustral [-h] {{{','.join(VERBS)}}}",
        "",
        ABOUT,
        "",
        Panel(table, title="commands", title_align="left"),
        "lustral COMMAND --help lists the flags of one; docs/python.md shows the same from Python;",
        "lustral completion {bash,zsh,fish} prints a script that completes them in that shell.",
    )
