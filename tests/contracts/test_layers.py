"""The architecture as tests: who imports whom, what packages offer, what the library never does."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lustral

ROOT = Path(lustral.__file__).parent

# The floors, from the bottom. A part may import the parts listed for it and nothing else of ours; a part of ``vision`` may
# import what all of ``vision`` may, and the parts of ``vision`` listed for it.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "store": {"core"},
    "training": {"core"},
    "vision": {"core", "training"},
    "molecules": {"core", "training"},
    "catalog": {"core", "vision"},
    "tables": {"core", "store"},
    "report": {"core", "training", "vision", "molecules"},
    "exchange": {"core"},
    "api": {"core", "training", "vision", "catalog", "report", "exchange"},
    "site": {"core", "store", "tables", "report"},
    "bench": {"core", "training", "vision", "molecules", "store", "tables", "catalog", "report"},
    "cli": {
        "core",
        "training",
        "vision",
        "molecules",
        "store",
        "tables",
        "catalog",
        "report",
        "exchange",
        "api",
        "site",
        "bench",
    },
    "__main__": {"cli"},
    "__init__": {"api"},
}
NOUNS = {"records", "interfaces", "images"}
WORKING = NOUNS | {"figures", "models", "evaluation"}
IN_VISION: dict[str, set[str]] = {
    "records": set(),
    "interfaces": {"records"},
    "measures": set(),
    "images": {"records"},
    "figures": NOUNS,
    "models": NOUNS,
    "sources": NOUNS,
    "evaluation": NOUNS,
    "attacks": WORKING,
    "inverters": WORKING,
    "detectors": WORKING | {"measures", "inverters"},  # what an inverter finds is what a detector weighs ...
    "repair": WORKING | {"inverters"},
    "suspicion": WORKING,
    "insight": WORKING,
    "sifters": WORKING | {"suspicion"},
    "purifiers": WORKING
    | {"measures", "inverters", "detectors", "repair", "suspicion", "sifters"},  # ... and what a purifier erases
    "safe_training": WORKING | {"suspicion", "sifters"},  # what is found suspicious is not learnt
    "scanning": NOUNS | {"measures"},
    "erasing": NOUNS | {"evaluation", "scanning"},
    "untrusted": NOUNS | {"evaluation"},
    "verdict_files": {"records"},
    "victim_files": set(),
    "victims": WORKING | {"attacks", "victim_files"},
    "__init__": set(),
}
ABOVE_THE_CATALOG = "vision/victims.py"  # the one file of a lower floor that looks a method up by its name
NO_TORCH = ("store", "tables", "exchange", "site")  # tables and pages must not wait for it
MOST_FILES = 14  # of a folder, so that a reader finds a file by its name
LONGEST = 60  # lines of a function, its docstring aside
LONG_FOR_A_REASON = {"step"}  # of a pickle: one branch for each opcode
METHODS = (
    "vision/attacks",
    "vision/purifiers",
    "vision/sifters",
    "vision/safe_training",
)  # their folders have a file for each method


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


def floors(allowed: dict[str, set[str]], depth: int, folder: Path) -> list[str]:
    """Return the imports that point up, at one depth of dotted names."""
    wrong = []
    for path, tree in sources():
        if folder not in path.parents:
            continue
        part = path.relative_to(folder).parts[0].removesuffix(".py")
        assert part in allowed, f"{part} has no place in the layers: name it in this test"
        for name in imported(tree):
            names = name.split(".")
            if names[1] == "catalog" and path == ROOT / ABOVE_THE_CATALOG:
                continue
            if names[1:depth] == list(folder.relative_to(ROOT).parts) and len(names) > depth:
                other = names[depth]
                if other in allowed and other not in allowed[part] | {part}:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    return wrong


def test_imports_point_one_way() -> None:
    assert not floors(ALLOWED, 1, ROOT)
    assert not floors(IN_VISION, 2, ROOT / "vision")


@pytest.mark.parametrize("allowed", [ALLOWED, IN_VISION], ids=["floors", "vision"])
def test_the_layers_have_no_circle(allowed: dict[str, set[str]]) -> None:
    done: set[str] = set()
    while len(done) < len(allowed):
        ready = {part for part, below in allowed.items() if below <= done} - done
        assert ready, f"a circle among {sorted(set(allowed) - done)}"
        done |= ready


def test_what_shows_results_imports_no_torch() -> None:
    names = [
        "lustral." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path, _ in sources()
        if part_of(path) in NO_TORCH and path.name != "__init__.py"
    ]
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_folder_holds_more_files_than_a_reader_can_look_over() -> None:
    for folder in {path.parent for path, _ in sources()}:
        name = folder.relative_to(ROOT).as_posix()
        if name not in METHODS:
            files = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(files) <= MOST_FILES, f"{name} has {len(files)} files: {', '.join(sorted(files))}"


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines a function has without its docstring."""
    first = function.body[0]
    is_documented = ast.get_docstring(function, clean=False) is not None
    return (
        (function.end_lineno or 0) - function.lineno + 1 - is_documented * ((first.end_lineno or 0) - first.lineno + 1)
    )


def test_no_function_is_longer_than_a_reader_can_hold() -> None:
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in LONG_FOR_A_REASON:
                assert lines_of(node) <= LONGEST, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


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
