"""The architecture as tests: who imports whom, what packages offer, what the library never does."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import lustral

ROOT = Path(lustral.__file__).parent

# A part may import the parts listed for it and nothing else of ours.
FOUNDATIONS = {"protocols", "randomness", "files", "versions", "characters", "limits", "allocation"}
MIDDLE = FOUNDATIONS | {"images", "models", "cost"}
WORKING = MIDDLE | {"training", "evaluation"}
METHODS = {"attacks", "inverters", "detectors", "purifiers"}
ALLOWED: dict[str, set[str]] = {
    "protocols": set(),
    "randomness": set(),
    "files": set(),
    "limits": set(),
    "allocation": set(),
    "victim_files": FOUNDATIONS,
    "versions": set(),
    "characters": set(),
    "settings": set(),
    "images": FOUNDATIONS,
    "cost": FOUNDATIONS,
    "models": FOUNDATIONS | {"images"},
    "sources": FOUNDATIONS | {"images"},
    "training": MIDDLE,
    "evaluation": MIDDLE | {"training"},
    "attacks": WORKING,
    "inverters": WORKING,
    "detectors": WORKING | {"inverters"},  # what an inverter finds is what a detector weighs ...
    "purifiers": WORKING | {"inverters", "detectors"},  # ... and what a purifier erases
    "catalog": METHODS | FOUNDATIONS,
    "report": WORKING,
    "victims": WORKING | METHODS | {"catalog", "report", "settings", "victim_files"},
    "bench": WORKING | METHODS | {"catalog", "report", "settings", "sources", "victims", "victim_files"},
    "cli": WORKING | METHODS | {"catalog", "report", "victims", "victim_files", "sources", "settings", "bench"},
    "__main__": {"cli"},
    "__init__": set(),
}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names of ours that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lustral."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lustral":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way() -> None:
    wrong = []
    for path, tree in sources():
        part = part_of(path)
        assert part in ALLOWED, f"{part} has no place in the layers: name it in this test"
        for name in imported(tree):
            other = name.split(".")[1]
            if other in ALLOWED and other not in ALLOWED[part] | {part}:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_the_layers_have_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {part for part, below in ALLOWED.items() if below <= done} - done
        assert ready, f"a circle among {sorted(set(ALLOWED) - done)}"
        done |= ready


@pytest.mark.parametrize("kind", ["attacks", "inverters", "detectors", "purifiers"])
def test_methods_of_one_kind_do_not_import_each_other(kind: str) -> None:
    """Every class that the catalog lists stands in a file of its own, which no other such file imports."""
    catalog = importlib.import_module("lustral.catalog")
    methods = {method.__module__ for method in getattr(catalog, kind.upper()).values()}
    assert len(methods) == len(getattr(catalog, kind.upper()))
    for path, tree in sources():
        own = "lustral." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if own in methods:
            others = {method for method in methods - {own} if any(n.startswith(f"{method}.") for n in imported(tree))}
            assert not others, f"{own} imports {others}"


def packages() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages([str(ROOT)], "lustral.") if module.ispkg]
    return ["lustral", *found]


@pytest.mark.parametrize("name", packages())
def test_what_a_package_offers_is_sorted_and_importable(name: str) -> None:
    package = importlib.import_module(name)
    if not hasattr(package, "__all__"):
        assert not [item for item in vars(package) if item[0].isupper()], "classes are offered without __all__"
        return
    offered = list(package.__all__)
    # constants, then classes, then functions: the order that the linter keeps
    assert offered == sorted(offered, key=lambda n: (0 if n.isupper() else 1 if n[:1].isupper() else 2, n))
    assert len(set(offered)) == len(offered)
    for item in offered:
        assert hasattr(package, item), f"{name}.{item}"


def calls(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_pickles_are_never_executed() -> None:
    for path, tree in sources():
        for call in calls(tree):
            if ast.unparse(call.func) in ("torch.load", "load_file", "pickle.load", "pickle.loads", "np.load"):
                safe = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
                name, value = safe.get(ast.unparse(call.func), ("", None))
                given = {
                    keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == name
                }
                assert given == {name: value}, f"{path.relative_to(ROOT)}:{call.lineno}"


def test_only_the_command_line_prints_and_nobody_names_a_device_by_method() -> None:
    for path, tree in sources():
        for call in calls(tree):
            where = f"{path.relative_to(ROOT)}:{call.lineno}"
            assert part_of(path) == "cli" or ast.unparse(call.func) != "print", where
            assert not (isinstance(call.func, ast.Attribute) and call.func.attr == "cuda"), where


def test_global_seeds_are_only_set_inside_a_fork() -> None:
    for path, tree in sources():
        forks = [
            (node.lineno, node.end_lineno or 0)
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item) for item in node.items)
        ]
        for call in calls(tree):
            if ast.unparse(call.func) in ("torch.manual_seed", "random.seed", "np.random.seed"):
                assert any(first < call.lineno <= last for first, last in forks), f"{path.name}:{call.lineno}"
