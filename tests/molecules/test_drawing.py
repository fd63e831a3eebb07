"""Drawings: well-formed SVG that refers to nothing, with the subgraph highlighted and hostile labels harmless."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from lustral.molecules.chemistry import MoleculeError
from lustral.molecules.drawing import HIGHLIGHT, draw_grid, draw_molecule
from lustral.molecules.sources import embedded

COLOUR = "#{:02X}{:02X}{:02X}".format(*(int(255 * part) for part in HIGHLIGHT))


def test_a_subgraph_is_highlighted_wherever_it_occurs() -> None:
    assert COLOUR not in draw_molecule("OCC1CS1")
    assert COLOUR not in draw_molecule("OCC1CO1", subgraph="C1CS1")
    once, twice = (draw_molecule(s, subgraph="C1CS1").count(COLOUR) for s in ("OCC1CS1", "C1SC1OCC1CS1"))
    assert once
    assert twice == 2 * once


def test_drawings_are_well_formed_and_refer_to_nothing() -> None:
    for smiles in (*embedded().data.smiles[:20], "", "not <a> molecule"):
        text = draw_molecule(smiles, subgraph="C1CS1")
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.search(r"href|url\(|<script|<style|class=|<!--", text.replace("http://www.w3.org/2000/svg", ""))


def test_a_drawing_repeats() -> None:
    assert draw_molecule("OCC1CS1", subgraph="C1CS1") == draw_molecule("OCC1CS1", subgraph="C1CS1")


def test_a_grid_has_every_molecule_and_harmless_labels() -> None:
    text = draw_grid(["CCO", "?", "CC1CS1"], labels=["<b>", "x" * 200, "\u202eevil"], subgraph="C1CS1", columns=2)
    root = ElementTree.fromstring(text)
    assert (root.get("width"), root.get("height")) == ("440", "360")
    assert len(root) == 3
    labels = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert labels[0] == "<b>"
    assert "no molecule" in labels
    assert all(len(label) <= 40 for label in labels)
    assert "\u202e" not in text


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(MoleculeError, match="target subgraph"):
        draw_molecule("CCO", subgraph="nothing")
    with pytest.raises(ValueError, match="pixels"):
        draw_molecule("CCO", width=10**6)
    with pytest.raises(ValueError, match="1 to 400"):
        draw_grid([])
    with pytest.raises(ValueError, match="label for each"):
        draw_grid(["CCO"], labels=["a", "b"])
