"""What is damaged, how, and what then opens it: as the commands do, and with what they do next."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz import specimens
from fuzz.mutators import (
    CODE_NAMES,
    ODD,
    damage_bytes,
    edit_json,
    edit_legacy,
    edit_npy,
    edit_picture,
    edit_safetensors,
    edit_toml,
    edit_torch,
    edit_value,
    edit_zip,
    json_text,
    planted_pickle_files,
)
from fuzz.trees import SPECIALS, Entry, Link, Tree
from lustral.api.opening import draw_clean, model_file
from lustral.bench.expansion import expand
from lustral.bench.plan import read_plan
from lustral.bench.sources import Sources
from lustral.bench.trust import Trust
from lustral.cli.entry import run
from lustral.cli.saved.reading import read_result
from lustral.core.files import canonical
from lustral.store.store import checksum_of, content_key
from lustral.vision.models import load_model, save_like
from lustral.vision.models.files.hub_folder import image_size_of
from lustral.vision.models.files.safety import facts_of_files
from lustral.vision.sources import check_class_names, load_source, read_class_names
from lustral.vision.victims import load_victim


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of thing that comes from outside.

    Attributes:
        rounds: damaged ones that the whole fuzz opens.
        few: those that the default tests open.
        make: returns the valid ones.
        damage: returns one that is damaged.
        open: opens what lies in a folder; may write in the folder beside it.
        ways: how often a valid one is opened first, so that all that ``open`` may draw was done once.
    """

    rounds: int
    few: int
    make: Callable[[], list[Tree]]
    damage: Callable[[Tree, Random], Tree]
    open: Callable[[Path, Path, Random], None]
    ways: int = 1


Edit = Callable[[bytes, Random], bytes]


def one_file(edit: Edit) -> Callable[[Tree, Random], Tree]:
    """Return what edits one file of a tree, or now and then puts something else in its place."""

    def damage(tree: Tree, draw: Random) -> Tree:
        name = draw.choice([*tree])
        content = tree[name]
        assert isinstance(content, bytes)
        if draw.random() < 0.01:
            return {**tree, name: draw.choice(SPECIALS)}
        return {**tree, name: edit(content, draw)}

    return damage


# Models


def open_model(folder: Path, aside: Path, draw: Random) -> None:
    """Open the only model of a folder, ask it for an answer and write one like it."""
    (path,) = folder.iterdir() if not (folder / "config.json").exists() else (folder,)
    asked: dict[str, Any] = {}
    if path.suffix != ".safetensors" and not path.is_dir():
        asked = {"arch": specimens.ARCH, "image_shape": specimens.SHAPE}
        if draw.random() < 0.3:
            asked["weights"] = draw.choice((".", "state_dict", "model"))
    elif draw.random() < 0.2:
        asked = {"arch": specimens.ARCH, "num_classes": 4}
    if path.is_dir():
        image_size_of(path)
    loaded = load_model(model_file(path), **asked)
    with torch.no_grad():
        loaded.model(torch.zeros(1, *loaded.image_shape))
    save_like(aside / "like", loaded.model, loaded)
    assert loaded.origin is not None
    assert not any(facts.code for facts in facts_of_files(loaded.origin.files)), "what opens holds no code"


def damage_torch(tree: Tree, draw: Random) -> Tree:
    if draw.random() < 0.05:
        return {name: planted_pickle_files(draw) for name in tree}
    return one_file(edit_torch)(tree, draw)


def damage_hub(tree: Tree, draw: Random) -> Tree:
    """Edit what a folder says, its weights, or what lies in it."""
    name = draw.choice([*tree, "config.json", "config.json", "config.json"])
    content = tree[name]
    assert isinstance(content, bytes)
    how = draw.random()
    if how < 0.05:
        return {**tree, draw.choice([*tree, "pytorch_model.bin.index.json"]): draw.choice(SPECIALS)}
    if how < 0.1:
        return {other: entry for other, entry in tree.items() if other != name}
    if how < 0.2 and name == "config.json":
        config = json.loads(content)
        config[draw.choice([*config])] = draw.choice((*CODE_NAMES, *ODD))
        return {**tree, name: json_text(config, draw)}
    if name.endswith(".json"):
        return {**tree, name: edit_json(content, draw)}
    if name.endswith(".safetensors"):
        return {**tree, name: edit_safetensors(content, draw)}
    if name.endswith(".bin"):
        return {**tree, name: edit_torch(content, draw)}
    return {**tree, name: damage_bytes(content, draw)}


# Data sets


def open_data(folder: Path, aside: Path, draw: Random) -> None:
    """Open a data set, as it is and in another size, and draw clean images from it."""
    paths = [*folder.iterdir()]
    spec = str(paths[0] if len(paths) == 1 and not paths[0].is_dir() else folder)
    size: dict[str, Any] = draw.choice(
        (
            {},
            {},
            {"image_size": (5, 7), "channels": 1},
            {"image_size": 9, "resize": 11},
            {"image_size": 6, "channels": 3},
        )
    )
    stream = draw.choice((False, None))
    source = load_source(spec, stream=stream, **size)
    if not len(source.defender_indices()):
        return
    clean = draw_clean(source, None, seed=0)
    assert int(clean.labels.min()) >= 0
    assert int(clean.labels.max()) < clean.num_classes


def damage_table(tree: Tree, draw: Random) -> Tree:
    if draw.random() < 0.4:
        return {"x.parquet": specimens.odd_table(draw)}
    return one_file(damage_bytes)(tree, draw)


def damage_picture(tree: Tree, draw: Random) -> Tree:
    """Edit the picture that is in the format of the kind."""
    (name,) = [name for name in tree if "/x." in name]
    return {**tree, **one_file(edit_picture)({name: tree[name]}, draw)}


_NAMES = (
    "\n",
    "\x1b[2J",
    "\u202e",
    "x" * 255,
    "..",
    "a b",
    "ä",
    "\udcff",
    ".hidden",
    "train",
    "test",
    "val",
    "A",
    "0",
    "[/red]",
    "a.png",
)


def damage_image_folder(tree: Tree, draw: Random) -> Tree:
    """Rename, remove and add entries; some are no files."""
    changed: dict[str, Entry] = dict(tree)
    for _ in range(draw.randrange(1, 4)):
        name = draw.choice([*changed])
        how = draw.randrange(7)
        parts = name.split("/")
        at = draw.randrange(len(parts))
        other = "/".join((*parts[:at], draw.choice(_NAMES), *parts[at + 1 :]))
        if how == 0:
            changed[other] = changed.pop(name)
        elif how == 1 and len(changed) > 1:
            del changed[name]
        elif how == 2:
            changed[f"{name.rpartition('/')[0]}/{draw.choice('xyz')}.png"] = draw.choice(SPECIALS)
        elif how == 3:
            changed["/".join([draw.choice(("a", "loop", "train", "c"))] * draw.choice((1, 3, 60)) + ["l"])] = Link(
                draw.choice(("..", ".", "../..", "/", "/proc/self", "/dev"))
            )
        elif how == 4:
            changed |= {
                f"c{number}/{draw.choice('xyz')}.png": changed[name] for number in range(draw.choice((2, 50, 400)))
            }
        elif how == 5:
            content = changed[name]
            changed[name] = edit_picture(content, draw) if isinstance(content, bytes) and content else b""
        else:
            changed[other] = changed[name]
    return changed


_LISTS = (b"%d\n", b"a\n", b"\xe2\x80\xae%d\n", b"\x1b[31m%d\n", b" \t%d  _-\n")


def damage_names(tree: Tree, draw: Random) -> Tree:
    """Edit names of classes, or list very many."""
    ((name, content),) = tree.items()
    assert isinstance(content, bytes)
    if draw.random() < 0.05:
        line, count = draw.choice(_LISTS), draw.choice((1000, 100_000))
        lines = b"".join(line % number if b"%" in line else line for number in range(count))
        return {name: lines if name.endswith(".txt") else json.dumps(lines.decode().split("\n")).encode()}
    return one_file(damage_bytes if name.endswith(".txt") else edit_json)(tree, draw)


def open_names(folder: Path, aside: Path, draw: Random) -> None:
    """Read names of classes, and bring labels into their order."""
    (path,) = folder.iterdir()
    names = read_class_names(path)
    if draw.random() < 0.1:
        check_class_names([f"class {number}" for number in range(100_000)], names)
    check_class_names(specimens.CLASSES, names)


# Victims


def damage_victim(tree: Tree, draw: Random) -> Tree:
    """Edit the record or the tensors; checksums mostly fit, since a stranger writes them too."""
    if draw.random() < 0.02:
        return {**tree, draw.choice([*tree]): draw.choice(SPECIALS)}
    name = draw.choice(["victim.json", *(name for name in tree if name.endswith((".json", ".safetensors")))])
    content, text = tree[name], tree["victim.json"]
    assert isinstance(content, bytes)
    assert isinstance(text, bytes)
    record = json.loads(text)
    changed = dict(tree)
    if name == "victim.json":
        if draw.random() < 0.1:
            record[draw.choice(("arch", "data", "attack"))] = draw.choice(CODE_NAMES)
        else:
            record = edit_value(record, draw)
    else:
        changed[name] = damage_bytes(content, draw) if draw.random() < 0.3 else edit_safetensors(content, draw)
        if draw.random() < 0.95:
            record["files"][name] = hashlib.sha256(changed[name]).hexdigest()
    return {**changed, "victim.json": json_text(record, draw)}


def open_victim(folder: Path, aside: Path, draw: Random) -> None:
    """Open a victim, and put its trigger into two images."""
    victim = load_victim(folder)
    channels, height, width = victim.provenance["image_shape"]
    if channels * height * width > 2**20:
        return
    images = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    for trigger in (victim.trigger, *(probe.trigger for probe in victim.probes.values())):
        triggered = trigger(images, generator=torch.Generator().manual_seed(0))
        assert triggered.shape == images.shape
        assert float(triggered.min()) >= 0
        assert float(triggered.max()) <= 1
    victim.relabel(torch.tensor([0, 1]), victim.provenance["num_classes"])
    with torch.no_grad():
        victim.model(images)


# Saved results


def open_result(folder: Path, aside: Path, draw: Random) -> None:
    """Make a page from a result; what is in it stays text."""
    page = aside / "page.html"
    read_result(folder / "result.json").write(page)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\x1b" not in text
    assert len(text) < 2**23


# Plans and stores


_sources = Sources()


def open_plan(folder: Path, aside: Path, draw: Random) -> None:
    """Read a plan and make its cells."""
    allowed = draw.random() < 0.05
    sources = Sources(trust=Trust(paths=True)) if allowed else _sources
    expand(read_plan(folder / "plan.toml"), sources)


def damage_store(tree: Tree, draw: Random) -> Tree:
    """Edit a record or a file of one; checksums mostly fit."""
    how = draw.random()
    records = [name for name in tree if name.split("/")[0] in ("scans", "purifications", "victims", "failures")]
    name = draw.choice(records)
    if how < 0.06:
        places = [*tree, "claims", "files/00", name.rpartition("/")[0]]  # gc watches a claim for a minute, by intent
        chosen = draw.choice(places)
        kept = {other: entry for other, entry in tree.items() if not other.startswith(f"{chosen}/")}
        return {**kept, chosen: draw.choice(SPECIALS)}
    if how < 0.12:
        return one_file(damage_bytes)(tree, draw)
    content = tree[name]
    assert isinstance(content, bytes)
    record = json.loads(content)
    changed: dict[str, Entry] = dict(tree)
    if how < 0.25 and record["files"]:
        part = draw.choice([*record["files"]])
        place = f"files/{record['key'][:2]}/{record['folder']}/{part}"
        inner = tree[place]
        assert isinstance(inner, bytes)
        changed[place] = edit_json(inner, draw) if part.endswith(".json") else edit_picture(inner, draw)
        record["files"][part] = {"sha256": hashlib.sha256(changed[place]).hexdigest(), "bytes": len(changed[place])}
    elif draw.random() < 0.6:
        record = edit_value(record, draw)
    else:  # another cell, under its own name
        spec = edit_value(record["spec"], draw)
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            key, folder = content_key(spec), f"files/{record['key'][:2]}/{record.get('folder')}/"
            moved = {other: entry for other, entry in tree.items() if other.startswith(folder)}
            changed = {other: entry for other, entry in tree.items() if other != name and other not in moved}
            changed |= {f"files/{key[:2]}/{other.split('/', 2)[2]}": entry for other, entry in moved.items()}
            record |= {"spec": spec, "key": key}
            name = f"{name.split('/')[0]}/{key[:2]}/{key}.json"
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        record["checksum"] = checksum_of(record)
        return {**changed, name: canonical(record)}
    return {**changed, name: json_text(record, draw)}


COMMANDS = (
    ("table", "--old"),
    ("compare", "baeraser", "mask_area"),
    ("verify", "--sample", "0", "--device", "cpu"),
    ("verify", "--sample", "9", "--device", "cpu"),
    ("gc", "--failures", "--old", "--grace", "0"),
)


def open_store(folder: Path, aside: Path, draw: Random) -> None:
    """Run one of the commands on a store."""
    command = draw.choice((*COMMANDS, ("site", "--out", str(aside / "site"))))
    run(["bench", *command, "--store", str(folder)])


# All of them


def picture_kind(form: str) -> Kind:
    return Kind(
        rounds=260,
        few=12,
        make=specimens.picture_folders(form),
        damage=damage_picture,
        open=open_data,
    )


KINDS: dict[str, Kind] = {
    "safetensors": Kind(
        rounds=1500, few=30, make=specimens.safetensors_files, damage=one_file(edit_safetensors), open=open_model
    ),
    "archive": Kind(rounds=1400, few=30, make=specimens.torch_files, damage=damage_torch, open=open_model),
    "legacy": Kind(rounds=900, few=30, make=specimens.legacy_files, damage=one_file(edit_legacy), open=open_model),
    "hub": Kind(rounds=900, few=25, make=specimens.hub_folders, damage=damage_hub, open=open_model),
    "npz": Kind(
        rounds=800,
        few=30,
        make=specimens.npz_files,
        damage=one_file(lambda content, draw: edit_zip(content, draw, edit_npy)),
        open=open_data,
    ),
    "parquet": Kind(rounds=800, few=30, make=specimens.parquet_files, damage=damage_table, open=open_data),
    **{form: picture_kind(form) for form in ("bmp", "jpg", "png", "ppm", "pgm", "pbm", "tif", "webp")},
    "images": Kind(rounds=400, few=25, make=specimens.image_folders, damage=damage_image_folder, open=open_data),
    "classes": Kind(rounds=500, few=25, make=specimens.class_files, damage=damage_names, open=open_names),
    "victim": Kind(rounds=1600, few=40, make=specimens.victim_folders, damage=damage_victim, open=open_victim),
    "result": Kind(rounds=900, few=30, make=specimens.result_files, damage=one_file(edit_json), open=open_result),
    "plan": Kind(rounds=1100, few=30, make=specimens.plan_files, damage=one_file(edit_toml), open=open_plan),
    "store": Kind(rounds=900, few=20, make=specimens.stores, damage=damage_store, open=open_store, ways=6),
}


def misbehave(folder: Path, aside: Path, draw: Random) -> None:
    """Do what the fuzz is there to see: which, a file says."""
    match (folder / "act").read_text():
        case "spin":
            while True:
                pass
        case "wait":
            os.mkfifo(aside / "pipe")
            (aside / "pipe").read_bytes()
        case "die":
            signal.raise_signal(signal.SIGKILL)
        case "raise":
            raise KeyError("x")
        case "take":
            bytearray(1 << 32)
        case "hide":
            try:
                bytearray(1 << 32)
            except MemoryError as error:
                raise ValueError("a refusal like any other") from error
        case "run":
            os.system("true")


ACTS = ("fine", "raise", "take", "hide", "run", "spin", "wait", "die", "fine")
PROBE = Kind(
    rounds=0,
    few=0,
    make=lambda: [{"act": b"fine"}],
    damage=lambda tree, draw: {"act": draw.choice(ACTS).encode()},
    open=misbehave,
)
