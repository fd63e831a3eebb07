"""A result in a notebook: the answer, what it rests on, and small pictures, without the page around them."""

from __future__ import annotations

from collections.abc import Sequence

from lustral.report.figures.pictures import PictureRow
from lustral.report.findings import Finding
from lustral.report.rendering import page_environment


def notebook_html(finding: Finding, *, notes: Sequence[str] = (), rows: Sequence[PictureRow] = ()) -> str:
    """Return a fragment of HTML that carries its style with it.

    Args:
        finding: the answer.
        notes: sentences that the user should read; those among the details are not said twice.
        rows: pictures, with a caption each.
    """
    details = tuple(sentence for sentence in finding.details if sentence not in notes)
    template = page_environment("lustral.report").get_template("notebook.html.j2")
    return template.render(finding=finding, details=details, notes=notes, rows=rows)
