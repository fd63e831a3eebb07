"""What was checked of a model as an in-toto Statement, to be signed: the files by their digests, and the answer of each check.

The statement is not signed here. It goes into a signed envelope as it is, or beside the model into a folder that is signed.

Reference: in-toto Attestation Framework, Statement v1 and predicate "test result" v0.1,
https://github.com/in-toto/attestation/blob/main/spec/predicates/test-result.md.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lustral.core.characters import visible
from lustral.core.files import canonical, json_ready
from lustral.exchange.checks import Check, checks_of_erase, checks_of_scan, overall

STATEMENT = "https://in-toto.io/Statement/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
Record = Mapping[str, Any]


def attestation_of_scan(record: Record) -> dict[str, Any]:
    """Return the statement about a scanned model; ``record`` is what ``result.json`` of ``lustral scan`` says."""
    return _statement(record, record["file_safety"]["files"], checks_of_scan(record))


def attestation_of_erase(record: Record) -> dict[str, Any]:
    """Return the statement about the model that ``lustral erase`` wrote, from what its ``result.json`` says."""
    return _statement(record, record["written_safety"]["files"], checks_of_erase(record))


def _statement(record: Record, files: Sequence[Record], checks: list[Check]) -> dict[str, Any]:
    names: dict[str, list[str]] = {"passed": [], "warned": [], "failed": []}
    for check in checks:
        names[check.answer].append(check.name)
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": visible(PurePath(entry["file"]).name), "digest": {"sha256": entry["sha256"]}} for entry in files
        ],
        "predicateType": TEST_RESULT,
        "predicate": {
            "result": overall(checks).upper(),
            "configuration": [_configuration(record)],
            **{f"{answer}Tests": found for answer, found in names.items()},
        },
    }


def _configuration(record: Record) -> dict[str, Any]:
    """Return everything needed to repeat the checks, as a resource that carries its content."""
    told = ("method", "settings", "scanning", "seed", "arch", "data", "clean_images", "versions")
    content = canonical(json_ready({name: record[name] for name in told if name in record}))
    return {
        "name": "settings.json",
        "mediaType": "application/json",
        "digest": {"sha256": hashlib.sha256(content).hexdigest()},
        "content": base64.b64encode(content).decode(),
    }
