"""The JSON Schemas of our own records, made from the records beside; ``python -m lustral.exchange.schemas FOLDER`` writes them.

They are open: a key that a later version adds breaks no reader. ``closed`` gives the same without that, which tests hold real
records against, so that nothing is written that is not described.

Reference: JSON Schema 2020-12, https://json-schema.org/draft/2020-12.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lustral.core.files import write_json_atomic
from lustral.exchange.bench_records import BENCH_RESULTS, BENCH_SCHEMA
from lustral.exchange.molecule_records import MOLECULE_RESULTS, MOLECULE_SCHEMA
from lustral.exchange.records import RESULTS, SCHEMA

DIALECT = "https://json-schema.org/draft/2020-12/schema"

DESCRIBED: dict[str, tuple[type[BaseModel], int]] = {
    **{command: (kind, SCHEMA) for command, kind in RESULTS.items()},
    **{f"molecules {command}": (kind, MOLECULE_SCHEMA) for command, kind in MOLECULE_RESULTS.items()},
    **{f"bench {command}": (kind, BENCH_SCHEMA) for command, kind in BENCH_RESULTS.items()},
}
"""By command: what its record holds, and the number of that description."""


def schema_of(command: str) -> dict[str, Any]:
    """Return the JSON Schema of the record of a command, such as "scan", "molecules scan" or "bench run".

    >>> schema_of("scan")["$id"]
    'urn:lustral:schema:scan:2'
    """
    kind, number = DESCRIBED[command]
    content = _each_object(kind.model_json_schema(by_alias=True), _plain)
    return {"$schema": DIALECT, "$id": f"urn:lustral:schema:{command.replace(' ', '-')}:{number}", **content}


def file_name(command: str) -> str:
    """Return the name of a schema's file.

    >>> file_name("molecules scan")
    'molecules-scan-1.schema.json'
    """
    return f"{command.replace(' ', '-')}-{DESCRIBED[command][1]}.schema.json"


def closed(schema: Any) -> Any:
    """Return a schema that allows no keys but those that it names."""

    def close(part: dict[str, Any]) -> dict[str, Any]:
        if "properties" in part and part.get("type") == "object":
            return {"additionalProperties": False, **part}
        return part

    return _each_object(schema, close)


def write_schemas(folder: Path) -> list[Path]:
    """Write every schema, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for command in DESCRIBED:
        write_json_atomic(folder / file_name(command), schema_of(command))
    return [folder / file_name(command) for command in DESCRIBED]


def _plain(part: dict[str, Any]) -> dict[str, Any]:
    """Leave out what pydantic adds: names of classes and fields as titles, and defaults that say that nothing is there."""
    if isinstance(part.get("title"), str):
        del part["title"]
    if "default" in part and not part["default"]:
        del part["default"]
    return part


def _each_object(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if isinstance(value, dict):
        return change({key: _each_object(item, change) for key, item in value.items()})
    return [_each_object(item, change) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
