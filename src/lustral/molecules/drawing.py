"""Molecules as SVG, with a subgraph highlighted: for reports, which embed the text as it is.

RDKit draws; letters are drawn as paths, so the picture needs no font and refers to nothing outside of itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from lustral.core.characters import visible
from lustral.molecules.chemistry import MoleculeError, check_target, rdkit, read

WIDTH, HEIGHT = 220, 160  # pixels
HIGHLIGHT = (1.0, 0.62, 0.55)  # red, green, blue of the subgraph, as the reports mark triggers
_LINE = 16  # pixels of a label
_LETTER = 6.2  # pixels of a letter of a label, on average
_LARGEST_SIDE = 4_096  # pixels
_MOST_DRAWN = 400


def draw_molecule(smiles: str, *, subgraph: str | None = None, width: int = WIDTH, height: int = HEIGHT) -> str:
    """Return an SVG element of a molecule on no background.

    Args:
        smiles: the molecule; a text that is none gives a picture that says so.
        subgraph: SMILES of what is highlighted wherever it occurs, or None.
        width: pixels.
        height: pixels.

    Raises:
        MoleculeError: the subgraph is none.
        ValueError: the picture would be too small or too large.

    >>> draw_molecule("CC1CS1", subgraph="C1CS1").startswith("<svg"), "no molecule" in draw_molecule("?")
    (True, True)
    """
    if not 20 <= min(width, height) <= max(width, height) <= _LARGEST_SIDE:
        raise ValueError(f"expected sides of 20 to {_LARGEST_SIDE} pixels; got {width} x {height}")
    query = read(check_target(subgraph)) if subgraph is not None else None
    molecule = read(smiles)
    if molecule is None:
        return _frame(width, height, _label("no molecule", width, height / 2))
    return _frame(width, height, _drawn(molecule, query, width, height))


def draw_grid(
    smiles: Sequence[str],
    *,
    labels: Sequence[str] = (),
    subgraph: str | None = None,
    columns: int = 4,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """Return one SVG element with molecules in rows.

    Args:
        smiles: the molecules, at most 400; texts that are none are shown as such.
        labels: a line below each molecule, cut to its width; empty for none.
        subgraph: SMILES of what is highlighted, or None.
        columns: molecules in a row.
        width: pixels of one molecule.
        height: pixels of one molecule, without its label.

    Raises:
        MoleculeError: the subgraph is none.
        ValueError: too many molecules, not one label for each, no columns, or wrong sides.
    """
    if not 0 < len(smiles) <= _MOST_DRAWN or columns < 1:
        raise ValueError(
            f"expected 1 to {_MOST_DRAWN} molecules in at least one column; got {len(smiles)} in {columns}"
        )
    if labels and len(labels) != len(smiles):
        raise ValueError(f"expected a label for each of {len(smiles)} molecules; got {len(labels)}")
    step = height + (_LINE + 4 if labels else 0)
    cells = []
    for place, each in enumerate(smiles):
        x, y = place % columns * width, place // columns * step
        picture = draw_molecule(each, subgraph=subgraph, width=width, height=height)
        label = _label(labels[place], width, height + _LINE - 4) if labels else ""
        cells.append(f'<g transform="translate({x} {y})">{picture}{label}</g>')
    rows = -(-len(smiles) // columns)
    return _frame(min(columns, len(smiles)) * width, rows * step, "".join(cells))


def _drawn(molecule: Any, query: Any, width: int, height: int) -> str:
    """Return the paths that RDKit draws."""
    from rdkit.Chem.Draw import rdMolDraw2D

    drawer = rdMolDraw2D.MolDraw2DSVG(width, height)
    options: Any = drawer.drawOptions()
    options.clearBackground = False
    options.setHighlightColour(HIGHLIGHT)
    atoms = sorted({atom for match in _matches(molecule, query) for atom in match})
    inside = set(atoms)
    bonds = [
        bond.GetIdx()
        for bond in molecule.GetBonds()
        if bond.GetBeginAtomIdx() in inside and bond.GetEndAtomIdx() in inside
    ]
    with rdkit().BlockLogs():
        rdMolDraw2D.PrepareAndDrawMolecule(drawer, molecule, highlightAtoms=atoms, highlightBonds=bonds)
        drawer.FinishDrawing()
    found = re.search(r"<svg[^>]*>(.*)</svg>", drawer.GetDrawingText(), flags=re.DOTALL)
    if found is None:
        raise MoleculeError("RDKit drew no picture; another version of it may: pip install -U rdkit")
    return re.sub(r"<!--.*?-->|\s*class='[^']*'|\n", "", found[1])  # classes would meet those of the page


def _matches(molecule: Any, query: Any) -> Sequence[Sequence[int]]:
    return molecule.GetSubstructMatches(query) if query is not None else ()


def _frame(width: float, height: float, inside: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{inside}</svg>'
    )


def _label(text: str, width: int, y: float) -> str:
    """Return a centred line of text, cut to a width."""
    most = max(1, int(width / _LETTER))
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return (
        f'<text x="{width / 2}" y="{y}" text-anchor="middle" font-family="sans-serif" font-size="11" '
        f'fill="currentColor">{escape(visible(shown))}</text>'
    )
