"""Results as SARIF, which code scanning shows beside the code that a model or a data set is used by.

A model that passed has no result, so that a dashboard closes what it showed before; the run's properties say how it was checked.

Reference: Static Analysis Results Interchange Format (SARIF) 2.1.0, OASIS Standard, 2020 (3.14 run, 3.19 toolComponent,
3.27 result); GitHub Docs, "SARIF support for code scanning": a result needs a text and a first line, a run has at most 25,000 of
them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import quote

from lustral.core.characters import visible
from lustral.exchange.taxonomies import (
    BACKDOORED,
    POISONED,
    RULES,
    TAXONOMIES,
    UNDECIDED,
    UNSAFE_FILE,
    Rule,
    Taxonomy,
)

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
MOST_RESULTS = 25_000  # of a run, as GitHub takes them
ROOT = "%SRCROOT%"  # what paths are relative to, by the name that code scanning knows
Record = Mapping[str, Any]


def sarif_of_scan(record: Record, *, exit_code: int) -> dict[str, Any]:
    """Return a scan as a SARIF log.

    Args:
        record: what ``result.json`` of ``lustral scan`` says.
        exit_code: of the command.
    """
    verdict, files = record["verdict"], record["file_safety"]["files"]
    results = [_unsafe_file(entry) for entry in files if _code_in(entry)]
    if verdict["outcome"] == "backdoored":
        results += [_accusation(record, label) for label in verdict["suspect_labels"]]
    elif verdict["outcome"] == "cannot tell":
        results.append(_result(UNDECIDED, files[0]["file"], f"{UNDECIDED.short} {verdict['basis']}", "model"))
    about = {
        "outcome": verdict["outcome"],
        "score": verdict["score"],
        "threshold": verdict["threshold"],
        "basis": verdict["basis"],
        "method": record["method"],
        "arch": record["arch"],
        "data": record["data"],
        "cleanImages": record["clean_images"],
        "seed": record["seed"],
    }
    invocation = _invocation(record["command"], exit_code)
    log = _log(record["versions"]["lustral"], results, invocation, artifacts=map(_artifact, files), about=about)
    return _called(log, f"lustral/scan/{record['model']}/")


def sarif_of_sift(record: Record, *, exit_code: int) -> dict[str, Any]:
    """Return the list of a sifter as a SARIF log: a result for each image.

    Args:
        record: what ``result.json`` of ``lustral sift`` says.
        exit_code: of the command.
    """
    found = record["sifted"]
    results = [_listed(record, name) for name in found["files"][:MOST_RESULTS]]
    invocation = _invocation(record["command"], exit_code)
    if found["listed"] > len(results):
        words = f"{found['listed']:,} images are listed; the first {len(results):,} are shown here, all in scores.csv."
        invocation["toolExecutionNotifications"] = [{"level": "warning", "message": {"text": words}}]
    about = {
        "listed": found["listed"],
        "images": record["images"],
        "threshold": found["threshold"],
        "basis": found["basis"],
        "method": record["method"],
        "seed": record["seed"],
    }
    log = _log(record["versions"]["lustral"], results, invocation, about=about)
    return _called(log, f"lustral/sift/{record['data']}/")


def sarif_of_refusal(
    model: str, files: Sequence[Record], *, message: str, command: str, version: str, exit_code: int
) -> dict[str, Any]:
    """Return what is said of a model that was not opened: that it failed, and which files would run code.

    Args:
        model: its path, as it was named.
        files: the facts about each file, as under ``file_safety`` of a scan.
        message: why it was not opened.
        command: the command line.
        version: of lustral.
        exit_code: of the command.
    """
    invocation = _invocation(command, exit_code, successful=False)
    invocation["toolExecutionNotifications"] = [{"level": "error", "message": {"text": visible(message)}}]
    results = [_unsafe_file(entry) for entry in files if _code_in(entry)]
    log = _log(version, results, invocation, artifacts=map(_artifact, files), about={"outcome": "not opened"})
    return _called(log, f"lustral/scan/{model}/")


def below(log: Any, root: str) -> Any:
    """Return a log in which files below a folder are told relative to it, as code scanning wants the files of a repository.

    Args:
        log: or a part of one.
        root: an absolute path.

    >>> below({"uri": "file:///srv/a/net.pt"}, "/srv/a")
    {'uri': 'net.pt', 'uriBaseId': '%SRCROOT%'}
    """
    if isinstance(log, list):
        return [below(part, root) for part in log]
    if not isinstance(log, dict):
        return log
    prefix = location_of(root)["uri"].rstrip("/") + "/"
    uri = log.get("uri")
    if isinstance(uri, str) and uri.startswith(prefix):
        return {**log, "uri": uri.removeprefix(prefix), "uriBaseId": ROOT}
    return {key: below(part, root) for key, part in log.items()}


def location_of(path: str) -> dict[str, str]:
    """Return a path as SARIF's artifact location: relative to the root of the sources, or a file URI.

    >>> location_of("models/my net.pt")
    {'uri': 'models/my%20net.pt', 'uriBaseId': '%SRCROOT%'}
    >>> location_of("/srv/net.pt")
    {'uri': 'file:///srv/net.pt'}
    """
    windows = PureWindowsPath(path)
    if windows.drive:
        return {"uri": f"file:///{quote(windows.as_posix(), safe='/:')}"}
    pure = PurePosixPath(path)
    uri = quote(pure.as_posix().encode("utf-8", "surrogateescape"))
    return {"uri": f"file://{uri}"} if pure.is_absolute() else {"uri": uri, "uriBaseId": ROOT}


def _accusation(record: Record, label: int) -> dict[str, Any]:
    verdict, name = record["verdict"], class_name(record, label)
    areas = [found["area"] for found in verdict["triggers"] if found["target_label"] == label]
    size = f" {areas[0]:.3g} pixels are enough." if areas and areas[0] is not None else ""
    text = f"Backdoored: a trigger leads to the class “{name}”.{size} {verdict['basis']}"
    result = _result(BACKDOORED, record["file_safety"]["files"][0]["file"], text, f"class {label}")
    values = [
        entry["p_value"] for entry in verdict["evidence"] if entry["label"] == label and entry["p_value"] is not None
    ]
    result["properties"] = {"targetLabel": label, "className": name} | ({"pValue": min(values)} if values else {})
    return result


def class_name(record: Record, label: int) -> str:
    """Return the name of a class, safe to show."""
    names = record.get("classes") or ()
    return visible(str(names[label])) if label < len(names) else f"class {label}"


def _listed(record: Record, name: str) -> dict[str, Any]:
    text = f"{POISONED.short} {record['sifted']['basis']}"
    if record["sifted"]["named_by"] == "file":
        return _result(POISONED, str(PurePosixPath(record["folder"], name)), text, name)
    result = _result(POISONED, record["data"], f"Image {name}: {text}", name)
    result["locations"][0]["logicalLocations"] = [
        {"name": name, "kind": "member", "fullyQualifiedName": f"image {name}"}
    ]
    return result


def _code_in(facts: Record) -> list[str]:
    return [entry["name"] for entry in facts["imports"] if not entry["is_data"]]


def _unsafe_file(facts: Record) -> dict[str, Any]:
    names = _code_in(facts)
    shown = ", ".join(visible(name) for name in names[:10]) + (
        f" and {len(names) - 10} more" if len(names) > 10 else ""
    )
    return _result(UNSAFE_FILE, facts["file"], f"{UNSAFE_FILE.short} It would import {shown}.", "file")


def _result(rule: Rule, path: str, text: str, what: str) -> dict[str, Any]:
    """Return a result about a file; equal ``what`` of one file and rule is the same finding in another run."""
    print_ = hashlib.sha256("\0".join((rule.identifier, path, what)).encode("utf-8", "surrogateescape")).hexdigest()
    place = {"artifactLocation": location_of(path), "region": {"startLine": 1}}  # binary, but viewers ask for a line
    return {
        "ruleId": rule.identifier,
        "ruleIndex": RULES.index(rule),
        "kind": "fail",
        "level": rule.level,
        "message": {"text": visible(text)},
        "locations": [{"physicalLocation": place}],
        "partialFingerprints": {"finding/v1": print_},
    }


def _artifact(facts: Record) -> dict[str, Any]:
    return {
        "location": location_of(facts["file"]),
        "length": facts["bytes"],
        "roles": ["analysisTarget"],
        "hashes": {"sha-256": facts["sha256"]},
        "properties": {"format": facts["format"]},
    }


def _invocation(command: str, exit_code: int, *, successful: bool = True) -> dict[str, Any]:
    return {"commandLine": visible(command), "exitCode": exit_code, "executionSuccessful": successful}


def _log(
    version: str,
    results: list[dict[str, Any]],
    invocation: dict[str, Any],
    *,
    artifacts: Iterable[dict[str, Any]] = (),
    about: Mapping[str, Any],
) -> dict[str, Any]:
    components = [{"name": taxonomy.name} for taxonomy in TAXONOMIES]
    driver = {
        "name": "lustral",
        "fullName": f"lustral {version}",
        "version": version,
        "semanticVersion": version,
        "organization": "lustral",
        "shortDescription": {"text": "Finds, shows and erases backdoors in image classifiers."},
        "rules": [_rule(rule) for rule in RULES],
        "supportedTaxonomies": components,
    }
    run = {
        "tool": {"driver": driver},
        "taxonomies": [_taxonomy(taxonomy) for taxonomy in TAXONOMIES],
        "invocations": [invocation],
        "results": results,
        "columnKind": "unicodeCodePoints",
        "properties": dict(about),
    }
    listed = list(artifacts)
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run | ({"artifacts": listed} if listed else {})]}


def _called(log: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a log whose run has a name of its own: a dashboard shows those of several models beside each other."""
    log["runs"][0]["automationDetails"] = {"id": visible(name)}
    return log


def _rule(rule: Rule) -> dict[str, Any]:
    found = [
        (taxonomy.name, taxon.identifier)
        for taxonomy in TAXONOMIES
        for taxon in taxonomy.taxa
        if taxon.identifier in rule.taxa
    ]
    relationships = [
        {"target": {"id": taxon, "toolComponent": {"name": taxonomy}}, "kinds": ["relevant"]}
        for taxonomy, taxon in found
    ]
    tags = [_tag(taxonomy, taxon) for taxonomy, taxon in found]
    return {
        "id": rule.identifier,
        "name": rule.name,
        "shortDescription": {"text": rule.short},
        "fullDescription": {"text": rule.full},
        "help": {"text": rule.help},
        "defaultConfiguration": {"level": rule.level},
        "relationships": relationships,
        "properties": {
            "security-severity": f"{rule.severity:.1f}",
            "precision": "high" if rule.level == "error" else "medium",
            "tags": ["security", *tags],
        },
    }


def _tag(taxonomy: str, taxon: str) -> str:
    return f"external/{taxonomy.lower().replace(' ', '-')}/{taxon}"


def _taxonomy(taxonomy: Taxonomy) -> dict[str, Any]:
    version = {"version": taxonomy.version} if taxonomy.version else {}
    taxa = [
        {
            "id": taxon.identifier,
            "name": taxon.name,
            "shortDescription": {"text": taxon.says},
            "helpUri": taxon.url,
        }
        for taxon in taxonomy.taxa
    ]
    about = {"organization": taxonomy.organization, "informationUri": taxonomy.url, "taxa": taxa}
    return {"name": taxonomy.name, **version, **about}
