"""Hold records against the schemas that are published for them."""

from __future__ import annotations

from typing import Any

import jsonschema

from lustral.exchange.schemas import closed, schema_of


def require_described(command: str, record: dict[str, Any]) -> None:
    """Check that a record has what the schema of its command asks for, and nothing that it does not name."""
    schema = schema_of(command)
    jsonschema.Draft202012Validator.check_schema(schema)
    strict = jsonschema.Draft202012Validator(closed(schema))
    strict.validate(record)
    assert strict.is_valid(record)
    for key in schema["required"]:
        assert not strict.is_valid({name: value for name, value in record.items() if name != key}), key
    assert not strict.is_valid({**record, "added_by_a_later_version": 1})
    assert jsonschema.Draft202012Validator(schema).is_valid({**record, "added_by_a_later_version": 1})
