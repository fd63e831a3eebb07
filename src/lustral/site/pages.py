"""A store of results as static pages: overview with heat maps, table of all cells, charts, a page per cell, victim and method.

    OUT/index.html table.html charts.html methods.html
    OUT/cells/KEY.html victims/KEY.html methods/NAME.html methods/NAME.json
    OUT/pictures/SHA256.png   each picture once
    OUT/assets/               style, scripts, and the data as scripts, because pages opened as files may not fetch anything
    OUT/lustral-site.json     says that this folder is a site of ours and may be replaced by the next one

The pages need no network and no server. They are written into a folder beside OUT that takes its place at the end, so a
killed run leaves the site that was there before. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import lustral
from lustral.report.words import count, duration
from lustral.site.addresses import file_name, page_of, table_link
from lustral.site.data import cells_script, means_of, settings_of, settings_script
from lustral.site.folder import LAYOUT, MARKER, PAGES, SiteError, recover, replacing, require_ours
from lustral.site.methods import folded, method_page, read_cards
from lustral.site.page_writer import OnPages, PageWriter
from lustral.site.records import PICTURES, Picture, Relatives, png_size, record_page
from lustral.store.store import DETAIL_FILE, MOST_RECORD_BYTES, Kind, Store, StoreError, read_json
from lustral.tables.rows import BENIGN, MEASURED, UNDEFENDED, current_cells, every_cell

TITLE = "Backdoor benchmark"
ASSETS = ("site.css", "theme.js", "common.js", "heat.js", "table.js", "charts.js")
KEY = re.compile(r"[0-9a-f]{64}")

MOST_PICTURE_BYTES = 32 << 20  # of one on a page


@dataclass(frozen=True, kw_only=True)
class SiteSummary:
    """What was written.

    Attributes:
        path: the site; open index.html in it.
        cells: pages of results, finished and failed.
        victims: pages of victims, finished and failed.
        methods: pages of methods.
        pictures: pictures.
        size: bytes of all files.
        seconds: wall time.
        problems: files of the store that are missing or damaged, and how many cells of older versions are left out; the
            pages say so too.
    """

    path: Path
    cells: int
    victims: int
    methods: int
    pictures: int
    size: int
    seconds: float
    problems: tuple[str, ...]


def write_site(
    store: Store,
    out: Path,
    *,
    cards: Path | None = None,
    title: str = TITLE,
    store_name: str = "STORE",
    on_progress: OnPages | None = None,
    old: bool = False,
) -> SiteSummary:
    """Write the pages of a store, in place of the site that may be there.

    Args:
        store: the results.
        out: the folder to write: new, empty, or a site of ours.
        cards: folder with a JSON file for each method: the published number and ours.
        title: of the site.
        store_name: what commands on the pages call the store; its real path is nobody's business.
        on_progress: told (pages written, pages in all).
        old: show results of older versions of a method too; else they are left out and counted.

    Raises:
        SiteError: ``out`` holds something else, or a record has no proper key.
        CardError: the cards cannot be read.
        StoreError: a record cannot be read.
        OSError: the disk is full, ``out`` cannot be written, ...
    """
    started = time.perf_counter()
    out = Path(os.path.realpath(out))
    recover(out)
    require_ours(out)
    contents = read_cards(cards)
    cells, note = every_cell(store) if old else current_cells(store)
    rows = sorted(cells.to_pylist(), key=_order)
    _require_keys(rows)
    with replacing(out) as folder:
        press = PageWriter(folder, title, on_progress)
        site = _Site(press, store, store_name, rows, contents, left_out=note)
        site.write(settings_of(cells), means_of(cells))
    is_victim = [row["kind"] == "victim" for row in rows]
    return SiteSummary(
        path=out,
        cells=len(rows) - sum(is_victim),
        victims=sum(is_victim),
        methods=len(site.methods),
        pictures=len(site.shelf.made),
        size=press.size,
        seconds=time.perf_counter() - started,
        problems=tuple(site.problems if note is None else [note, *site.problems]),
    )


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return where a row comes in the table: victims first, what belongs together side by side."""
    names = ("data", "arch", "attack", "poison_rate", "defence", "clean_images", "seed", "defence_seed")
    return row["kind"] != "victim", *((row[name] is not None, row[name]) for name in names)


def _require_keys(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        for name in ("key", "victim_key"):
            if row[name] is not None and not KEY.fullmatch(row[name]):
                raise SiteError(f"a record has the {name} {row[name]!r}; expected 64 hexadecimal digits")


@dataclass
class _PictureStore:
    """Puts pictures of records into the site, each content once."""

    press: PageWriter
    store: Store
    made: dict[str, tuple[int, int]] = field(default_factory=dict)

    def take(self, record: Mapping[str, Any], name: str) -> Picture:
        """Return a picture of a record.

        Raises:
            StoreError: the file is missing, damaged, or no PNG.
        """
        digest = record["files"][name]["sha256"]
        if digest not in self.made:
            content = self.store.file(record, name, most=MOST_PICTURE_BYTES)
            size = png_size(content)
            if size is None:
                raise StoreError(f"{name} of {record['key']} is no PNG")
            self.press.file(f"pictures/{digest}.png", content)
            self.made[digest] = size
        width, height = self.made[digest]
        return Picture(path=f"pictures/{digest}.png", width=width, height=height, caption=PICTURES[name])


@dataclass
class _Site:
    press: PageWriter
    store: Store
    store_name: str
    rows: list[dict[str, Any]]
    cards: Mapping[str, Mapping[str, Any]]
    left_out: str | None = None
    problems: list[str] = field(default_factory=list)
    triggers: dict[str, Picture] = field(default_factory=dict)  # by victim

    def __post_init__(self) -> None:
        self.shelf = _PictureStore(self.press, self.store)
        self.press.total = len(self.rows) + len(self.methods) + len(PAGES)

    @cached_property
    def methods(self) -> list[str]:
        """Names of all methods that have a card or a cell."""
        used = {row[name] for row in self.rows for name in ("attack_method", "defence_method")}
        return sorted({*self.cards, *used} - {UNDEFENDED, None})

    @cached_property
    def relatives(self) -> Relatives:
        return Relatives(self.rows)

    def write(self, settings: Sequence[Mapping[str, Any]], means: Sequence[Mapping[str, Any]]) -> None:
        """Write everything; the marker comes last."""
        templates = package_files("lustral.site") / "templates"
        for name in ASSETS:
            self.press.file(f"assets/{name}", (templates / name).read_bytes())
        curves = package_files("lustral.report") / "templates" / "curves.css"
        self.press.file("assets/curves.css", curves.read_bytes())
        self.press.file("assets/settings.js", settings_script(settings, means))
        self.press.file("assets/cells.js", cells_script(self.rows))
        for row in sorted(
            self.rows, key=lambda row: row["kind"] != "victim"
        ):  # victims first: results show their trigger
            self.record(row)
        kinds = {name: self.method(name, settings, means) for name in self.methods}
        self.press.page("index.html.j2", "index.html", is_wide=True, it=self.overview())
        self.press.page("table.html.j2", "table.html", is_wide=True)
        self.press.page("charts.html.j2", "charts.html", is_wide=True)
        self.press.page("methods.html.j2", "methods.html", is_wide=False, methods=self.method_list(kinds))
        marker = {"lustral_site": LAYOUT, "version": lustral.__version__, "cells": len(self.rows)}
        self.press.file(MARKER, json.dumps(marker) + "\n")

    # -- one record -------------------------------------------------------------------------------------------------

    def record(self, row: Mapping[str, Any]) -> None:
        """Write the page of a cell or a victim."""
        problems: list[str] = []
        record = self.read(row, problems)
        detail = self.detail(record, problems)
        pictures = []
        if row["victim_key"] in self.triggers:
            pictures.append(self.triggers[row["victim_key"]])
        for name in PICTURES:
            if name in record["files"]:
                try:
                    pictures.append(self.shelf.take(record, name))
                except StoreError as error:
                    problems.append(self.unnamed(error))
                    continue
                if row["kind"] == "victim":
                    self.triggers[row["key"]] = pictures[-1]
        for shown, curves in ((record, detail), (record, {}), (self.bare(row), {})):
            try:
                page = record_page(
                    shown,
                    row,
                    curves,
                    pictures=pictures,
                    relatives=self.relatives,
                    problems=problems,
                    store_name=self.store_name,
                )
                self.press.page("record.html.j2", page_of(row), is_wide=False, **page)
                break
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
                part = DETAIL_FILE if curves else "record"
                problems.append(f"The {part} of {row['key'][:12]} holds something else than ours do.")
        else:
            raise SiteError(f"the record {row['key'][:12]} cannot be shown")
        self.problems += problems

    def read(self, row: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        """Return a row's record; if it is gone or damaged, as much as the row tells."""
        folders: dict[str, Kind] = {kind.removesuffix("s"): kind for kind in MEASURED}
        try:
            return self.store.read("failures" if row["status"] != "done" else folders[row["kind"]], row["key"])
        except KeyError:
            problems.append(f"The record {row['key'][:12]} went away while the site was being made.")
        except StoreError as error:
            problems.append(self.unnamed(error))
        return self.bare(row)

    def bare(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return as much of a record as its row tells."""
        names = ("key", "kind", "status", "title", "victim_key")
        made = {"seconds": None, **{name: row[name] for name in ("at", "device", "threads")}}
        empty = {"files": {}, "spec": {}, "made": made, "error": row["error"] or "", "traceback": ""}
        return {**{name: row[name] for name in names}, **empty}

    def detail(self, record: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        """Return a record's curves and evidence, or nothing."""
        if DETAIL_FILE not in record["files"]:
            return {}
        try:
            found = read_json(self.store.file(record, DETAIL_FILE, most=MOST_RECORD_BYTES))
        except StoreError as error:
            problems.append(self.unnamed(error))
            return {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            problems.append(f"{DETAIL_FILE} of {record['key'][:12]} is not readable.")
            return {}
        return found

    def unnamed(self, error: StoreError) -> str:
        """Return an error without the place of the store: pages are for others to see."""
        return str(error).replace(f"{self.store.root}/", "")

    # -- methods and overview ---------------------------------------------------------------------------------------

    def method(self, name: str, settings: Sequence[Mapping[str, Any]], means: Sequence[Mapping[str, Any]]) -> str:
        """Write a method's page and return its kind."""
        own = [row for row in settings if name in (row["attack_method"], row["defence_method"])]
        page = method_page(name, self.cards.get(name), own, [row for row in means if row["defence_method"] == name])
        self.press.page("method.html.j2", f"methods/{file_name(name)}.html", is_wide=True, it=page)
        if page["file"]:
            self.press.file(f"methods/{page['file']}", folded(self.cards[name]) + "\n")
        return str(page["kind"])

    def method_list(self, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
        counts = dict.fromkeys(self.methods, 0)
        for row in self.rows:
            for name in {row["attack_method"], row["defence_method"]} & counts.keys():
                counts[name] += 1
        return [
            {
                "name": name,
                "file": file_name(name),
                "kind": kinds[name],
                "cells": count(counts[name]),
                "has_card": name in self.cards,
            }
            for name in self.methods
        ]

    def overview(self) -> dict[str, Any]:
        """Return what the first page shows beside the heat maps."""
        done = [row for row in self.rows if row["status"] == "done"]
        results = [row for row in done if row["kind"] != "victim"]
        victims = [row for row in done if row["kind"] == "victim"]
        failures = len(self.rows) - len(done)
        spent = sum(row["seconds"] or 0.0 for row in results) + sum(row["victim_seconds"] or 0.0 for row in victims)
        tiles = [
            ("results", count(len(results))),
            ("victims", count(len(victims))),
            ("attacks", count(len({row["attack"] for row in done} - {BENIGN}))),
            ("defences", count(len({row["defence"] for row in results}))),
            ("data sets", count(len({row["data"] for row in done}))),
            ("seeds", count(len({row["seed"] for row in done}))),
            ("computing time", duration(spent)),
            ("failed cells", count(failures)),
        ]
        return {
            "tiles": tiles,
            "is_empty": not self.rows,
            "columns": ("victims", "attacks", "poison rates", "defences", "clean images", "seeds", "results", "failed"),
            "holdings": [
                _holding(data, arch, self.rows) for data, arch in sorted({(r["data"], r["arch"]) for r in self.rows})
            ],
            "failures": failures,
            "left_out": self.left_out,
            "problems": self.problems,
        }


def _holding(data: str, arch: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the line of one data set and network."""
    mine = [row for row in rows if row["data"] == data and row["arch"] == arch]
    done = [row for row in mine if row["status"] == "done"]
    results = [row for row in done if row["kind"] != "victim"]
    rates = sorted({row["poison_rate"] for row in done} - {None})
    budgets = sorted({row["clean_images"] for row in results})
    texts = [
        count(len(done) - len(results)),
        count(len({row["attack"] for row in done} - {BENIGN})),
        ", ".join(f"{100 * rate:.4g}%" for rate in rates) or "–",
        count(len({row["defence"] for row in results})),
        ", ".join(count(budget) for budget in budgets) or "–",
        count(len({row["seed"] for row in done})),
        count(len(results)),
        count(len(mine) - len(done)),
    ]
    return {"data": data, "arch": arch, "href": table_link("", data=data, arch=arch), "texts": texts}
