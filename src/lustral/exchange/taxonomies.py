"""The names that others have for what we look for: MITRE ATLAS's techniques and a requirement of OWASP AISVS; and our rules.

Reference: MITRE ATLAS, https://atlas.mitre.org (release of 2026); OWASP AI Security Verification Standard 1.0, chapter C6.1,
https://github.com/OWASP/AISVS. Descriptions are our own words. Drafts of AISVS had other requirements under these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Taxon:
    """An entry of somebody's list.

    Attributes:
        identifier: as the list has it.
        name: in a few words.
        says: in a sentence.
        url: of its page.
    """

    identifier: str
    name: str
    says: str
    url: str


@dataclass(frozen=True, kw_only=True)
class Taxonomy:
    """Somebody's list.

    Attributes:
        name: of the list.
        organization: who keeps it.
        version: of the list; empty where we do not hold to one.
        url: of the list.
        taxa: the entries that we refer to.
    """

    name: str
    organization: str
    version: str
    url: str
    taxa: tuple[Taxon, ...]


def _technique(identifier: str, name: str, says: str) -> Taxon:
    return Taxon(identifier=identifier, name=name, says=says, url=f"https://atlas.mitre.org/techniques/{identifier}")


def _requirement(identifier: str, name: str, says: str) -> Taxon:
    return Taxon(identifier=identifier, name=name, says=says, url="https://github.com/OWASP/AISVS")


ATLAS = Taxonomy(
    name="MITRE ATLAS",
    organization="MITRE",
    version="",
    url="https://atlas.mitre.org",
    taxa=(
        _technique(
            "AML.T0018.000", "Poison AI Model", "Weights are changed so that a model does what an attacker wants."
        ),
        _technique("AML.T0018.002", "Embed Malware", "A model file holds code that runs when it is opened."),
        _technique("AML.T0020", "Poison Training Data", "A training set is changed so that a model learns a backdoor."),
        _technique("AML.T0043.004", "Insert Backdoor Trigger", "A pattern in an input wakes a backdoor up."),
    ),
)
AISVS = Taxonomy(
    name="OWASP AISVS",
    organization="OWASP Foundation",
    version="1.0",
    url="https://github.com/OWASP/AISVS",
    taxa=(
        _requirement("6.1.1", "Malicious code", "A model is scanned for malicious code before it is imported."),
        _requirement(
            "6.1.4", "Acceptance tests", "A model passes tests of its behaviour before it leaves development."
        ),
    ),
)
TAXONOMIES = (ATLAS, AISVS)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Something that we report.

    Attributes:
        identifier: never given to something else.
        name: in one word.
        short: what a result of it says, in a sentence.
        full: how it was found, and how sure that is.
        help: what to do.
        level: SARIF's "error" or "warning".
        severity: from 0 to 10, as code scanning sorts by it.
        taxa: identifiers of what others call it.
    """

    identifier: str
    name: str
    short: str
    full: str
    help: str
    level: str
    severity: float
    taxa: tuple[str, ...]


BACKDOORED = Rule(
    identifier="LUSTRAL001",
    name="BackdooredModel",
    short="A small pattern turns images of other classes into one class: the model is backdoored.",
    full="A detector looked at the model and some clean images, and its figures pass a threshold that benign models seldom pass. "
    "The result names the class and the threshold that the answer rests on.",
    help="Do not use the model where a wrong answer matters. Erase the backdoor with `lustral erase`, and find out where the "
    "model came from.",
    level="error",
    severity=9.0,
    taxa=("AML.T0018.000", "AML.T0020", "AML.T0043.004", "6.1.4"),
)
UNDECIDED = Rule(
    identifier="LUSTRAL002",
    name="UndecidedModel",
    short="The scan cannot tell whether the model is backdoored: it has not passed the test.",
    full="Nothing could be measured that an answer could rest on, or the figures lie between the answers.",
    help="Give more clean images of the kind that the model was trained on, and check how its inputs are normalised.",
    level="warning",
    severity=5.0,
    taxa=("AML.T0018.000", "6.1.4"),
)
POISONED = Rule(
    identifier="LUSTRAL003",
    name="SuspiciousImage",
    short="An image of a training set is listed as poisoned.",
    full="A sifter gave the image a score above the line that it drew for this set. Some clean images are listed too.",
    help="Look at the image and its label. Train on what `lustral sift --write-clean` copies, or with `lustral train`.",
    level="warning",
    severity=7.0,
    taxa=("AML.T0020", "6.1.4"),
)
UNSAFE_FILE = Rule(
    identifier="LUSTRAL004",
    name="UnsafeModelFile",
    short="Opening the model file with pickle would run code.",
    full="The pickle in the file imports names that are not needed for weights. Nothing of it was run; the file was refused.",
    help="Do not open the file. Ask its author for the weights alone, best as safetensors.",
    level="error",
    severity=9.5,
    taxa=("AML.T0018.002", "6.1.1"),
)
RULES = (BACKDOORED, UNDECIDED, POISONED, UNSAFE_FILE)
