"""The examples for pipelines, run as the shell steps that they are: a backdoored model fails the build, an erased one passes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_results import QUICK, write_pictures

import lustral
from lustral.vision.models import Classifier, save_model
from lustral.vision.purifiers import BaEraser
from lustral.vision.records import Victim
from toy import clean_images, gentle_trainer, quick_inverter

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def repository(backdoored: Victim, benign: Victim, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's repository: two models, clean images, and programs of this checkout on the PATH."""
    place = tmp_path_factory.mktemp("repository")
    (place / "models").mkdir()
    for name, victim in (("backdoored", backdoored), ("benign", benign)):
        assert isinstance(victim.model, Classifier)
        file = place / "models" / f"{name}.safetensors"
        save_model(file, victim.model, arch="small_cnn:width=16", image_shape=(3, 12, 12))
    write_pictures(place / "data" / "clean", clean_images())
    programs = place / "programs"
    programs.mkdir()
    for name, line in (
        ("lustral", f'exec {shlex.quote(sys.executable)} -m lustral "$@"'),
        ("python", f'exec {shlex.quote(sys.executable)} "$@"'),
        ("pip", f'[ "$*" = {shlex.quote(f"install {ROOT}")} ]'),  # it is there: by PYTHONPATH
    ):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    return place


def environment(repository: Path, **more: str) -> dict[str, str]:
    paths = {
        "PATH": f"{repository / 'programs'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "GITHUB_STEP_SUMMARY": str(repository / "summary.txt"),
    }
    return {**os.environ, **paths, **more}


def run_steps(job: Any, repository: Path, **settings: str) -> tuple[int, list[str]]:
    """Run the ``run:`` steps of a job as GitHub does, and return the first exit code that is not 0, and the steps that ran."""
    code, ran = 0, []
    for step in job["steps"]:
        if "run" in step and (code == 0 or step.get("if") == "always()"):
            env = environment(repository, **{**job["env"], **settings})
            done = subprocess.run(["bash", "-e", "-c", step["run"]], cwd=repository, env=env, check=False)
            ran.append(step["name"])
            code = code or done.returncode
    return code, ran


def scanned(repository: Path, model: str) -> tuple[int, str, str]:
    """Run the job of the example on a model; return its exit code, and what its summary and its statement say."""
    workflow = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text(encoding="utf-8"))
    shutil.rmtree(repository / "scan", ignore_errors=True)
    (repository / "summary.txt").unlink(missing_ok=True)
    settings = {"MODEL": model, "LUSTRAL": str(ROOT), "FLAGS": QUICK}
    code, ran = run_steps(workflow["jobs"]["scan"], repository, **settings)
    assert ran == ["Install", "Scan the model", "Show what was found in the summary"]
    assert {"model.cdx.json", "report.html", "result.json"} <= {path.name for path in (repository / "scan").iterdir()}
    log = json.loads((repository / "scan" / "findings.sarif").read_text())
    assert len(log["runs"][0]["results"]) == code
    statement = json.loads((repository / "scan" / "model.intoto.json").read_text())
    return code, (repository / "summary.txt").read_text(), statement["predicate"]["result"]


def test_the_actions_example_fails_on_a_victim_and_passes_what_erase_makes_of_it(repository: Path) -> None:
    code, summary, result = scanned(repository, "models/backdoored.safetensors")
    assert (code, result) == (1, "FAILED")
    assert "'outcome': 'backdoored'" in summary
    eraser = BaEraser(inverter=quick_inverter(), trainer=gentle_trainer())
    given, clean = repository / "models" / "backdoored.safetensors", repository / "data" / "clean"
    erased = lustral.erase(given, clean, verdict=repository / "scan", method=eraser, audit=False)
    erased.save(repository / "erased")
    code, summary, result = scanned(repository, "erased/model.safetensors")
    assert (code, result) == (0, "PASSED")
    assert "'outcome': 'clean'" in summary


def test_the_pre_commit_example_passes_a_benign_model_and_refuses_a_backdoored_one(repository: Path) -> None:
    (repo,) = yaml.safe_load((EXAMPLES / "pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (hook,) = repo["hooks"]
    line = [
        *shlex.split(hook["entry"]),
        "models/benign.safetensors",
        "models/backdoored.safetensors",
    ]  # as it calls a hook
    env = environment(repository, LUSTRAL_FLAGS=QUICK)
    done = subprocess.run(line, cwd=repository, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    benign, backdoored = done.stdout.split("models/backdoored.safetensors")
    assert "No backdoor found" in benign
    assert "Backdoored" in backdoored
