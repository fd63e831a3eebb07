"""The flags of ``lustral report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lustral.cli.parsing import FLAT, Common


@dataclass(frozen=True, kw_only=True)
class Report:
    """Render the page of a scan or an erasure again from its result.json.

    Attributes:
        result: result.json of `lustral scan` or `lustral erase`, its folder, or a file of what --json printed.
        out: the page; beside the result, under its name with the ending .html, if left out.
    """

    result: tyro.conf.Positional[Path]
    out: Path | None = None
    common: Annotated[Common, FLAT] = Common()
