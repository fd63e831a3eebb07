"""Templates into pages: everything is escaped, and characters that a reader cannot see are shown. Imports no torch."""

from __future__ import annotations

from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lustral.core.characters import visible


def page_environment(*packages: str) -> Environment:
    """Return the environment of the templates of some packages, and of those that reports and site share."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in dict.fromkeys((*packages, "lustral.report"))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        finalize=shown,
    )


def shown(value: Any) -> Any:
    """Return what a template prints, with escapes for characters that a reader cannot see; markup of ours stays markup."""
    if isinstance(value, Markup):
        return Markup(visible(value, keep="\n\t"))
    return visible(value, keep="\n\t") if isinstance(value, str) else value
