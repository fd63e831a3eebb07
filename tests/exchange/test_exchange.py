"""SARIF, CycloneDX, in-toto and our own schemas: real results of the commands, held against the schemas of the formats."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from real_results import Results
from referencing import Registry, Resource

from described import require_described
from lustral.cli import main
from lustral.cli.bench_commands import OUTPUT_SCHEMA
from lustral.exchange import records
from lustral.exchange.attestation import TEST_RESULT, attestation_of_erase, attestation_of_scan
from lustral.exchange.bench_records import BENCH_SCHEMA
from lustral.exchange.cyclonedx import cyclonedx_of_erase, cyclonedx_of_scan
from lustral.exchange.molecule_records import MOLECULE_SCHEMA
from lustral.exchange.sarif import sarif_of_scan, sarif_of_sift
from lustral.exchange.schemas import DESCRIBED, file_name, write_schemas
from lustral.exchange.taxonomies import RULES
from lustral.molecules import verdict_files as molecule_verdict_files
from lustral.vision import verdict_files

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "tests" / "schemas"
STATEMENT: dict[str, Any] = {  # of the parts that we write; in-toto publishes its fields in words and as protobuf only
    "type": "object",
    "additionalProperties": False,
    "required": ["_type", "subject", "predicateType", "predicate"],
    "properties": {
        "_type": {"const": "https://in-toto.io/Statement/v1"},
        "subject": {
            "type": "array",
            "minItems": 1,
            "items": {"$ref": "#/$defs/resource", "required": ["name", "digest"]},
        },
        "predicateType": {"const": "https://in-toto.io/attestation/test-result/v0.1"},
        "predicate": {
            "type": "object",
            "additionalProperties": False,
            "required": ["result", "configuration"],
            "properties": {
                "result": {"enum": ["PASSED", "WARNED", "FAILED"]},
                "configuration": {"type": "array", "items": {"$ref": "#/$defs/resource"}},
                "url": {"type": "string"},
                **{
                    f"{name}Tests": {"type": "array", "items": {"type": "string"}}
                    for name in ("passed", "warned", "failed")
                },
            },
        },
    },
    "$defs": {
        "resource": {
            "type": "object",
            "properties": {
                "digest": {
                    "type": "object",
                    "properties": {"sha256": {"pattern": "^[0-9a-f]{64}$"}},
                    "additionalProperties": {"type": "string"},
                },
                **{name: {"type": "string"} for name in ("name", "uri", "content", "downloadLocation", "mediaType")},
                "annotations": {"type": "object"},
            },
            "additionalProperties": False,
            "anyOf": [{"required": [name]} for name in ("uri", "digest", "content")],
        }
    },
}


def published(name: str) -> Any:
    return json.loads((SCHEMAS / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sarif() -> jsonschema.Draft4Validator:
    return jsonschema.Draft4Validator(published("sarif-2.1.0-rtm.5.json"))


@pytest.fixture(scope="module")
def cyclonedx() -> jsonschema.Draft7Validator:
    names = ("jsf-0.82.SNAPSHOT.schema.json", "spdx.SNAPSHOT.schema.json")
    parts = [(f"http://cyclonedx.org/schema/{name}", Resource.from_contents(published(name))) for name in names]
    return jsonschema.Draft7Validator(
        published("bom-1.6.SNAPSHOT.schema.json"), registry=Registry().with_resources(parts)
    )


def with_outcome(record: Any, outcome: str, labels: list[int]) -> Any:
    """Return a copy of a scan's record with another answer."""
    changed = copy.deepcopy(record)
    changed["verdict"] |= {"outcome": outcome, "suspect_labels": labels}
    return changed


# SARIF


def test_a_backdoored_model_is_a_sarif_error_with_its_rule(results: Results, sarif: jsonschema.Draft4Validator) -> None:
    log = results.read("scan.sarif")
    sarif.validate(log)
    (run,) = log["runs"]
    assert results.codes["scan"] == 1
    (result,) = run["results"]
    rule = run["tool"]["driver"]["rules"][result["ruleIndex"]]
    assert (result["ruleId"], result["level"], result["kind"]) == ("LUSTRAL001", "error", "fail")
    assert rule["id"] == "LUSTRAL001"
    taxa = {each["target"]["id"] for each in rule["relationships"]}
    assert taxa == {"AML.T0018.000", "AML.T0020", "AML.T0043.004", "6.1.4"}
    named = {taxon["id"] for taxonomy in run["taxonomies"] for taxon in taxonomy["taxa"]}
    assert named >= {taxon for each in RULES for taxon in each.taxa}
    assert "“eel”" in result["message"]["text"]  # class 4
    assert result["properties"]["targetLabel"] == 4
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].endswith("victim/model.safetensors")
    digest = hashlib.sha256((results.folder / "victim" / "model.safetensors").read_bytes()).hexdigest()
    assert run["artifacts"][0]["hashes"] == {"sha-256": digest}
    assert run["invocations"][0]["exitCode"] == 1
    assert run["automationDetails"]["id"] == f"lustral/scan/{results.folder / 'victim'}/"


def test_a_model_that_passed_has_no_result_and_an_undecided_one_warns(
    results: Results, sarif: jsonschema.Draft4Validator
) -> None:
    clean = sarif_of_scan(with_outcome(results.printed["scan"], "clean", []), exit_code=0)
    unsure = sarif_of_scan(with_outcome(results.printed["scan"], "cannot tell", []), exit_code=3)
    for log in (clean, unsure):
        sarif.validate(log)
    assert clean["runs"][0]["results"] == []
    assert clean["runs"][0]["properties"]["outcome"] == "clean"
    assert [(r["ruleId"], r["level"]) for r in unsure["runs"][0]["results"]] == [("LUSTRAL002", "warning")]


def test_each_listed_image_is_a_sarif_result(results: Results, sarif: jsonschema.Draft4Validator) -> None:
    log, record = results.read("sift.sarif"), results.printed["sift"]
    sarif.validate(log)
    assert results.codes["sift"] == 1
    (run,) = log["runs"]
    assert len(run["results"]) == record["sifted"]["listed"] == 12
    places = [result["locations"][0]["physicalLocation"]["artifactLocation"] for result in run["results"]]
    assert all((Path(each["uri"].removeprefix("file://").replace("%20", " "))).is_file() for each in places)
    prints = {result["partialFingerprints"]["finding/v1"] for result in run["results"]}
    assert len(prints) == 12

    by_place = copy.deepcopy(record)
    by_place["sifted"] |= {"named_by": "position", "files": ["3", "17"], "listed": 2}
    by_place["data"] = "sets/arrays.npz"
    log = sarif_of_sift(by_place, exit_code=1)
    sarif.validate(log)
    place = log["runs"][0]["results"][1]["locations"][0]
    assert place["physicalLocation"]["artifactLocation"] == {"uri": "sets/arrays.npz", "uriBaseId": "%SRCROOT%"}
    assert place["logicalLocations"][0]["name"] == "17"

    by_place["sifted"] |= {"files": ["1"] * 25_001, "listed": 25_001}
    (run,) = sarif_of_sift(by_place, exit_code=1)["runs"]
    assert len(run["results"]) == 25_000
    assert "25,001 images are listed" in run["invocations"][0]["toolExecutionNotifications"][0]["message"]["text"]


class Shell:
    """Wants to run a command when it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch it_ran",)


def test_a_refused_file_is_told_in_sarif_and_nothing_of_it_runs(
    results: Results,
    sarif: jsonschema.Draft4Validator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("theirs.pt").write_bytes(pickle.dumps({"weights": Shell()}))
    words = ["scan", "theirs.pt", "--arch", "small_cnn", "--data", str(results.folder / "toy.npz"), "--quiet"]
    assert main([*words, "--sarif", "new/out.sarif"]) == 2
    assert not Path("it_ran").exists()
    assert "refused" in capsys.readouterr().err
    log = json.loads(Path("new/out.sarif").read_text())
    sarif.validate(log)
    (run,) = log["runs"]
    assert [result["ruleId"] for result in run["results"]] == ["LUSTRAL004"]
    assert "posix.system" in run["results"][0]["message"]["text"]
    assert run["invocations"][0]["executionSuccessful"] is False
    assert run["artifacts"][0]["location"] == {"uri": "theirs.pt", "uriBaseId": "%SRCROOT%"}


def test_a_refused_folder_names_the_file_with_the_code(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    (tmp_path / "hub" / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": Shell()}))
    words = ["scan", str(tmp_path / "hub"), "--data", str(results.folder / "toy.npz"), "--quiet"]
    assert main([*words, "--arch", "small_cnn", "--sarif", "out.sarif"]) == 2
    (run,) = json.loads(Path("out.sarif").read_text())["runs"]
    (result,) = run["results"]
    place = result["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place == {"uri": "hub/pytorch_model.bin", "uriBaseId": "%SRCROOT%"}  # below the current folder
    assert "refused" in capsys.readouterr().err
    assert not Path("it_ran").exists()


def test_exports_are_refused_where_they_would_do_harm(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    model = results.folder / "victim" / "model.safetensors"
    before = model.read_bytes()
    line = ["scan", str(model), "--data", str(results.folder / "toy.npz"), "--quiet"]
    for wrong, says in (
        (["--sarif", str(model)], "would write over what is looked at"),
        (["--cyclonedx", str(results.folder)], "is a folder"),
        (["--sarif", "x.json", "--attestation", "x.json"], "name one file twice"),
    ):
        assert main([*line, *wrong]) == 2
        assert says in capsys.readouterr().err
    assert model.read_bytes() == before


# CycloneDX


@pytest.mark.parametrize("name", ["scan", "erase", "plain"])
def test_bills_of_materials_are_valid_and_refer_to_what_is_there(
    name: str, results: Results, cyclonedx: jsonschema.Draft7Validator
) -> None:
    bom = results.read(f"{name}.cdx.json")
    cyclonedx.validate(bom)
    (model,) = bom["components"]
    assert (model["type"], bom["specVersion"]) == ("machine-learning-model", "1.6")
    folder = "victim" if name == "scan" else name
    digest = hashlib.sha256((results.folder / folder / "model.safetensors").read_bytes()).hexdigest()
    assert model["hashes"] == [{"alg": "SHA-256", "content": digest}]
    assert model["modelCard"]["modelParameters"]["modelArchitecture"] == "small_cnn:width=16"
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    references = [value for key, value in strings(bom) if key == "bom-ref"]
    assert len(set(references)) == len(references)
    told = bom["declarations"]
    (attestation,) = told["attestations"]
    for row in attestation["map"]:
        assert {row["requirement"], *row.get("claims", []), *row.get("counterClaims", [])} <= set(references)
    assert {ref for claim in told["claims"] for ref in (claim["target"], *claim["evidence"])} <= set(references)
    if name != "scan":
        (given,) = model["pedigree"]["ancestors"]
        assert given["hashes"] != model["hashes"]


def test_a_bill_says_what_failed(results: Results) -> None:
    by_requirement = {row["requirement"]: row for row in rows(results.read("scan.cdx.json"))}
    assert by_requirement["owasp-aisvs/6.1.4"]["counterClaims"] == ["claim/lustral.scan.mask_area"]
    assert by_requirement["owasp-aisvs/6.1.4"]["conformance"]["score"] == 0
    assert by_requirement["owasp-aisvs/6.1.1"]["conformance"]["score"] == 1
    passed = cyclonedx_of_scan(with_outcome(results.printed["scan"], "clean", []), made="2026-01-01T00:00:00Z")
    assert [row["conformance"]["score"] for row in rows(passed)] == [1, 1]
    unscanned = cyclonedx_of_erase(results.printed["plain"], made="2026-01-01T00:00:00Z")
    assert "score" not in rows(unscanned)[1]["conformance"]  # nobody looked


def test_equal_results_at_one_time_are_equal_bills(results: Results) -> None:
    first, second = (cyclonedx_of_scan(results.printed["scan"], made="2026-01-01T00:00:00Z") for _ in range(2))
    other = cyclonedx_of_scan(results.printed["scan"] | {"seed": 9}, made="2026-01-01T00:00:00Z")
    assert first == second
    assert first["serialNumber"] != other["serialNumber"]


def rows(bom: Any) -> Any:
    return bom["declarations"]["attestations"][0]["map"]


def strings(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Return every text inside a value with its key."""
    if isinstance(value, dict):
        return [found for name, inner in value.items() for found in strings(inner, name)]
    if isinstance(value, list):
        return [found for inner in value for found in strings(inner, key)]
    return [(key, value)] if isinstance(value, str) else []


# in-toto


@pytest.mark.parametrize(("name", "answer"), [("scan", "FAILED"), ("erase", None), ("plain", "WARNED")])
def test_statements_have_the_fields_of_in_toto(name: str, answer: str | None, results: Results) -> None:
    statement = results.read(f"{name}.intoto.json")
    jsonschema.Draft202012Validator(STATEMENT).validate(statement)
    assert statement["predicateType"] == TEST_RESULT
    folder = "victim" if name == "scan" else name
    digest = hashlib.sha256((results.folder / folder / "model.safetensors").read_bytes()).hexdigest()
    assert statement["subject"] == [{"name": "model.safetensors", "digest": {"sha256": digest}}]
    predicate = statement["predicate"]
    audit = results.printed["erase"]["purified"]["audit"]["outcome"]
    assert predicate["result"] == (answer or {"clean": "PASSED", "cannot tell": "WARNED"}.get(audit, "FAILED"))
    (settings,) = predicate["configuration"]
    content = base64.b64decode(settings["content"])
    assert hashlib.sha256(content).hexdigest() == settings["digest"]["sha256"]
    assert json.loads(content)["seed"] == 1


def test_a_model_passes_only_where_everything_passed(results: Results) -> None:
    scanned = with_outcome(results.printed["scan"], "clean", [])
    assert attestation_of_scan(scanned)["predicate"]["result"] == "PASSED"
    scanned["file_safety"] |= {"runs_code": True}
    assert attestation_of_scan(scanned)["predicate"]["failedTests"] == ["lustral.files"]
    assert attestation_of_erase(results.printed["plain"])["predicate"]["warnedTests"] == ["lustral.audit"]


# Our own schemas


@pytest.mark.parametrize("name", ["scan", "erase", "plain", "sift", "train", "evaluate"])
def test_records_hold_what_their_schema_says_and_nothing_else(name: str, results: Results) -> None:
    for record in (results.read(f"{name}/result.json"), results.printed[name]):
        require_described(name.replace("plain", "erase"), record)


@pytest.mark.parametrize("attack", ["badnets", "none"])
def test_an_implanted_model_is_described(
    attack: str, results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"implant {attack} --data {results.folder / 'toy.npz'} --out {tmp_path} --arch small_cnn:width=2 --epochs 1"
    assert main([*line.split(), "--json", "--quiet", "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    require_described("implant", record)
    assert record["schema"] == records.SCHEMA
    assert (record["num_poisoned"] > 0) == (attack == "badnets")


def test_what_a_recovered_trigger_does_is_measured_before_and_after(results: Results) -> None:
    (rates,) = results.printed["erase"]["recovered"]
    assert rates["class"] == "eel"
    assert rates["before"]["n"] == rates["after"]["n"] == 240  # 280 clean images of seven classes, without its own
    assert rates["before"]["value"] > rates["after"]["value"]
    assert results.printed["plain"]["recovered"] == []


def test_files_and_classes_are_part_of_the_record(results: Results) -> None:
    record = results.printed["scan"]
    assert record["classes"] == ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
    (file,) = record["file_safety"]["files"]
    assert (file["format"], file["imports"], record["file_safety"]["runs_code"]) == ("safetensors", [], False)
    assert file["sha256"] == record["sha256"]
    page = (results.folder / "scan" / "report.html").read_text(encoding="utf-8")
    assert "The given file" in page
    assert file["sha256"] in page


def test_published_schemas_are_those_of_this_version(tmp_path: Path) -> None:
    for made in write_schemas(tmp_path):
        kept = ROOT / "docs" / "schemas" / made.name
        advice = "python -m lustral.exchange.schemas docs/schemas"
        assert json.loads(kept.read_text()) == json.loads(made.read_text()), advice
    assert {path.name for path in (ROOT / "docs" / "schemas").glob("*.json")} == set(map(file_name, DESCRIBED))


def test_what_is_described_is_what_is_read_back() -> None:
    assert records.SCHEMA == verdict_files.RESULT_SCHEMA
    assert MOLECULE_SCHEMA == molecule_verdict_files.RESULT_SCHEMA
    assert BENCH_SCHEMA == OUTPUT_SCHEMA
    pairs = (
        (records.Verdict, verdict_files._Verdict),
        (records.Figure, verdict_files._Figure),
        (records.Trigger, verdict_files._Trigger),
        (records.Cost, verdict_files._Cost),
        (records.Handover, verdict_files._Handover),
    )
    for described, read in pairs:
        assert set(described.model_fields) == set(read.model_fields), described
