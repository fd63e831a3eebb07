"""A scanned or erased model as a CycloneDX bill of materials: what it is, what it hashes to, what was checked, and who says so.

Reference: CycloneDX 1.6 (ECMA-424), https://cyclonedx.org/docs/1.6/json: component "machine-learning-model", modelCard,
declarations (assessors, claims, attestations), definitions.standards.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lustral.core.characters import visible
from lustral.core.files import canonical, json_ready
from lustral.exchange.checks import FILES, LIMITS, Check, checks_of_erase, checks_of_scan
from lustral.exchange.taxonomies import AISVS, ATLAS

SPEC = "1.6"
MODEL, ASSESSOR, STANDARD = "model", "lustral", "owasp-aisvs"  # bom-refs
SCORES = {"passed": 1.0, "failed": 0.0}  # of conformance; none where nothing can be told
FILE_PARTS = ("file_safety", "written_safety")  # of a record, as evidence
SCAN_PARTS = ("method", "settings", "scanning", "seed", "verdict", "accuracy", "versions")
Record = Mapping[str, Any]


def cyclonedx_of_scan(record: Record, *, made: str) -> dict[str, Any]:
    """Return the bill of materials of a scanned model.

    Args:
        record: what ``result.json`` of ``lustral scan`` says.
        made: when, as ISO 8601 in UTC.
    """
    verdict = record["verdict"]
    model = _model(record, record["model"], record["file_safety"]["files"])
    accuracy = verdict["clean_accuracy"]
    if accuracy is not None:
        metric = {"type": "accuracy", "value": f"{accuracy:.4f}", "slice": f"{record['clean_images']} clean images"}
        model["modelCard"]["quantitativeAnalysis"] = {"performanceMetrics": [metric]}
    return _bom(record, model, checks_of_scan(record), made=made)


def cyclonedx_of_erase(record: Record, *, made: str) -> dict[str, Any]:
    """Return the bill of materials of the model that an eraser wrote; the given one is its ancestor.

    Args:
        record: what ``result.json`` of ``lustral erase`` says.
        made: when, as ISO 8601 in UTC.
    """
    model = _model(record, record["written"], record["written_safety"]["files"])
    given = _component(record["model"], record["file_safety"]["files"], "given-model")
    words = f"`lustral erase --method {record['method']}` changed the weights; keys and shapes are those of the given model."
    model["pedigree"] = {"ancestors": [given], "notes": words}
    metrics = [
        {
            "type": "accuracy",
            "value": f"{rates['after']['value']:.4f}",
            "slice": name,
            "confidenceInterval": {
                "lowerBound": f"{rates['after']['low']:.4f}",
                "upperBound": f"{rates['after']['high']:.4f}",
            },
        }
        for name, rates in record["accuracy"].items()
        if rates["after"]["value"] is not None
    ]
    model["modelCard"]["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return _bom(record, model, checks_of_erase(record), made=made)


def _model(record: Record, path: str, files: Sequence[Record]) -> dict[str, Any]:
    channels, height, width = record["image_shape"]
    classes = record["classes"]
    card = {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "image-classification",
            "modelArchitecture": visible(record["arch"]),
            "inputs": [{"format": f"images of {channels} x {height} x {width}, numbers in [0, 1]"}],
            "outputs": [{"format": f"logits of {len(classes)} classes"}],
        },
        "considerations": {
            "technicalLimitations": [LIMITS],
            "ethicalConsiderations": [
                {
                    "name": f"{taxon.identifier} {taxon.name}: {taxon.says}",
                    "mitigationStrategy": "Looked for; see the declarations of this document.",
                }
                for taxon in ATLAS.taxa
            ],
        },
        "properties": [_property("lustral:class", visible(name)) for name in classes],
    }
    return _component(path, files, MODEL) | {"modelCard": card}


def _component(path: str, files: Sequence[Record], reference: str) -> dict[str, Any]:
    """Return a model with its files inside it; the hash of a single file is the model's."""
    inner = [
        {
            "type": "file",
            "bom-ref": f"{reference}/{number}",
            "name": visible(PurePath(entry["file"]).name),
            "hashes": [_hash(entry["sha256"])],
            "properties": [
                _property("lustral:format", entry["format"]),
                _property("lustral:bytes", str(entry["bytes"])),
                *(_property("lustral:pickle:import", visible(each["name"])) for each in entry["imports"]),
            ],
        }
        for number, entry in enumerate(files)
    ]
    hashes = {"hashes": [_hash(files[0]["sha256"])]} if len(files) == 1 else {}
    name = visible(PurePath(path).name or path)
    return {"type": "machine-learning-model", "bom-ref": reference, "name": name, **hashes, "components": inner}


def _bom(record: Record, model: Mapping[str, Any], checks: Sequence[Check], *, made: str) -> dict[str, Any]:
    content: dict[str, Any] = {
        "components": [model],
        "declarations": _declarations(record, checks, made=made),
        "definitions": {"standards": [_standard()]},
    }
    number = uuid.UUID(bytes=hashlib.sha256(canonical(json_ready(content))).digest()[:16], version=4)
    tool = {"type": "application", "name": "lustral", "version": record["versions"]["lustral"]}
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
        "metadata": {
            "timestamp": made,
            "lifecycles": [{"phase": "post-build"}],
            "tools": {"components": [tool]},
            "properties": [_property("lustral:command", visible(record["command"]))],
        },
        **content,
    }


def _declarations(record: Record, checks: Sequence[Check], *, made: str) -> dict[str, Any]:
    """Return what we assert of the model, requirement by requirement, with what it rests on."""
    claims, evidence, rows = [], [], []
    for check in checks:
        claims.append(
            {
                "bom-ref": f"claim/{check.name}",
                "target": MODEL,
                "predicate": check.claim,
                "reasoning": visible(check.reason),
                "evidence": [f"evidence/{check.name}"],
            }
        )
        evidence.append(
            {
                "bom-ref": f"evidence/{check.name}",
                "propertyName": check.name,
                "description": f"seed {record['seed']}, {record['clean_images']} clean images of {visible(record['data'])}",
                "created": made,
                "data": [{"name": "result.json", "contents": {"attachment": _attachment(record, check)}}],
            }
        )
        conformance: dict[str, Any] = {"rationale": visible(check.reason)}
        if check.answer in SCORES:
            conformance["score"] = SCORES[check.answer]
        list_name = "counterClaims" if check.answer == "failed" else "claims"
        rows.append(
            {
                "requirement": f"{STANDARD}/{check.requirement}",
                list_name: [f"claim/{check.name}"],
                "conformance": conformance,
            }
        )
    return {
        "assessors": [{"bom-ref": ASSESSOR, "thirdParty": False, "organization": {"name": "the user of lustral"}}],
        "attestations": [{"summary": "What lustral checked of the model.", "assessor": ASSESSOR, "map": rows}],
        "claims": claims,
        "evidence": evidence,
    }


def _attachment(record: Record, check: Check) -> dict[str, str]:
    """Return the figures behind a claim, as ``result.json`` has them."""
    told = FILE_PARTS if check.name == FILES else SCAN_PARTS
    text = canonical(json_ready({name: record[name] for name in told if name in record})).decode()
    return {"contentType": "application/json", "content": text}


def _standard() -> dict[str, Any]:
    requirements = [
        {"bom-ref": f"{STANDARD}/{taxon.identifier}", "identifier": taxon.identifier, "text": taxon.says}
        for taxon in AISVS.taxa
    ]
    return {
        "bom-ref": STANDARD,
        "name": AISVS.name,
        "version": AISVS.version,
        "owner": AISVS.organization,
        "requirements": requirements,
        "externalReferences": [{"type": "website", "url": AISVS.url}],
    }


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}


def _property(name: str, value: str) -> dict[str, str]:
    return {"name": name, "value": value}
