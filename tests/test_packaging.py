"""What is shipped: a wheel that works without the source tree, one version everywhere, files that tools read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import lustral

ROOT = Path(__file__).parents[1]
USED = """
import json, sys
import lustral
from lustral.molecules.sources import embedded
from lustral.report import rendering
from lustral.vision.sources import load_source
print(json.dumps({"home": lustral.__file__, "version": lustral.__version__, "pairs": len(embedded().data),
                  "digits": len(load_source("digits").train)}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src"):
        subprocess.run(
            ["cp", "-r", str(ROOT / name), str(source / name)], check=True
        )  # no build folder in the checkout
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    return next(folder.glob("lustral-*.whl"))


def test_the_wheel_has_every_file_that_is_no_code(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    package = ROOT / "src"
    outside = {
        str(path.relative_to(package))
        for path in (package / "lustral").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert outside - inside == set()
    assert not any(name.startswith("tests/") for name in inside)


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an empty environment with the wheel in it."""
    place = tmp_path_factory.mktemp("empty")
    venv.create(place / "env", with_pip=False)
    python = place / "env" / "bin" / "python"
    asked = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, capture_output=True
    )
    site = Path(asked.stdout.decode().strip())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    # what lustral depends on is borrowed; a line of a .pth file adds a folder, and not what that folder's own .pth files add
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def test_the_wheel_works_where_there_is_no_checkout(python: Path, tmp_path: Path) -> None:
    ran = subprocess.run([python, "-I", "-c", USED], check=True, capture_output=True, cwd=tmp_path)
    said = json.loads(ran.stdout)
    assert Path(said["home"]).is_relative_to(python.parents[1])
    assert said["version"] == lustral.__version__
    assert said["pairs"] > 100
    assert said["digits"] > 1_000


@pytest.mark.slow  # minutes: it trains, searches and erases
def test_the_wheel_runs_the_demo(python: Path, tmp_path: Path) -> None:
    line = [python, "-I", "-m", "lustral", "demo", "--out", "out", "--json", "--quiet", "--device", "cpu"]
    ran = subprocess.run(line, check=True, capture_output=True, cwd=tmp_path)
    said = json.loads(ran.stdout)
    assert said["change"]["erased"] is True
    assert said["purified"]["verdict"]["outcome"] == "backdoored"
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "report.html").is_file()


def test_there_is_one_version(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == lustral.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lustral.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_have_what_their_host_asks_for(form: Path) -> None:
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(content)
    fields = [part["id"] for part in content["body"]]
    assert len(fields) == len(set(fields))
    assert all(part["attributes"]["label"] for part in content["body"])


def test_the_image_copies_what_is_there_and_scans_by_default() -> None:
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY "):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name
                assert f"!{name}" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    entry = json.loads(next(line for line in lines if line.startswith("ENTRYPOINT ")).removeprefix("ENTRYPOINT "))
    assert entry == ["lustral", "scan"]
    assert any(line.startswith("USER ") and not re.search(r"\broot\b", line) for line in lines)
