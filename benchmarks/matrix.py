"""Write the comparison of all methods in docs/methods.md, from the catalog and the cards.

    python benchmarks/matrix.py

``benchmarks/publish.py`` does it too. What a method needs and costs stands in its class; figures are those of the kept rows, as
that script wrote them into the cards. A test compares the page with what this one would write.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lustral.core.files import write_text_atomic
from lustral.core.versions import listed_methods, listed_rooms

ROOT = Path(__file__).resolve().parent.parent
WORKED = 0.5  # attack success rate from which a victim counts
ASR_FLOOR, MOST_LOSS, LEAST_ROBUST = 0.05, 0.03, 0.8  # as lustral.vision.evaluation.protocol calls a backdoor erased
PAGES = {"fine_tuning": "controls", "bn_refresh": "controls", "plain": "plain_training"}
ROOMS = ("ATTACKS", "DETECTORS", "INVERTERS", "PURIFIERS", "SIFTERS", "SAFE_TRAINERS")
NOTHING = "not measured"

Victim = Mapping[str, Any]


def table(head: str, lines: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown; ``head`` has the columns' names between bars."""
    rule = "|".join("---" for _ in head.split("|"))
    return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {' | '.join(map(str, line))} |" for line in lines)])


def percent(rates: Sequence[float]) -> str:
    """Return the mean of fractions in per cent, or a dash of none."""
    return f"{100 * statistics.fmean(rates) + 0.0:.1f}" if rates else "—"


def read_cards(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the cards by method."""
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return {card["method"]: card for card in cards}


def plans_of(card: Mapping[str, Any] | None) -> dict[str, list[Victim]]:
    """Return a card's victims by plan, without those of other settings than the method's own."""
    if card is None:
        return {}
    tables = next((part for name, part in card.items() if name not in ("method", "published", "ours")), {})
    return {plan: [victim for victim in found["victims"] if is_own(victim)] for plan, found in tables.items()}


def is_own(victim: Victim) -> bool:
    """Say whether a victim met a method with its own settings: its name then has no part like ``choose=held_out``.

    >>> is_own({"name": "badnets, vgg19_bn:width=32"}), is_own({"name": "badnets, choose=held_out"})
    (True, False)
    """
    parts = str(victim.get("name", "")).split(", ")[1:]
    return not any("=" in part and ":" not in part for part in parts)


def link(name: str) -> str:
    """Return a method's name as a link to its page."""
    return f"[`{name}`](methods/{PAGES.get(name, name)}.md)"


def published(card: Mapping[str, Any] | None) -> str:
    """Return a card's published rates."""
    told = {} if card is None else card["published"]
    shown = [f"{name.upper()} {100 * told[name]:.1f}" for name in ("acc", "asr", "tpr") if name in told]
    return ", ".join(shown) or "—"


def attack_lines(names: Sequence[str], cards: Mapping[str, Any]) -> Iterator[list[object]]:
    """Yield a line for each attack: accuracy and success on digits, mean over seeds."""
    for name in names:
        own = plans_of(cards.get(name)).get("zoo_toy", [])
        rates = [percent([victim[rate] for victim in own]) for rate in ("acc", "asr")]
        yield [link(name), listed_methods()[name]["threat_model"], *rates, len(own), published(cards.get(name))]


def starts_from(about: Mapping[str, Any]) -> str:
    """Return what a purifier starts from beside clean images."""
    if about.get("takes_verdict"):
        return "a scan"
    return "the training set" if about.get("takes_untrusted") else "clean images"


def is_erased(loss: float, *, acc: float, asr: float, ra: float) -> bool:
    """Say whether an eraser took a backdoor away, left the accuracy, and triggered images are recognised again."""
    return asr < ASR_FLOOR and loss < MOST_LOSS and ra >= LEAST_ROBUST * acc


def erased(victim: Victim) -> bool:
    """Say the same of a victim of a card."""
    return is_erased(victim["acc_before"] - victim["acc"], **{name: victim[name] for name in ("acc", "asr", "ra")})


def handled(plans: Mapping[str, Sequence[Victim]]) -> str:
    """Return how many backdoors of each attack an eraser took away, of those that it met in all plans."""
    met: dict[str, list[bool]] = {}
    for victims in plans.values():
        for victim in victims:
            if victim.get("asr_before", 0.0) > WORKED and "asr" in victim:
                met.setdefault(victim["attack"].split()[0], []).append(erased(victim))
    return ", ".join(f"{attack} {sum(found)} of {len(found)}" for attack, found in sorted(met.items())) or NOTHING


def eraser_lines(names: Sequence[str], cards: Mapping[str, Any]) -> Iterator[list[object]]:
    """Yield a line for each eraser: what it left on digits, and what it handled anywhere."""
    for name in names:
        about, plans = listed_methods()[name], plans_of(cards.get(name))
        met = [victim for victim in plans.get("erasers_toy", []) if victim.get("asr_before", 0.0) > WORKED]
        left, lost = [victim["asr"] for victim in met], [victim["acc_before"] - victim["acc"] for victim in met]
        told = [link(name), about["needs"], starts_from(about), f"{about['cost_passes']:g}"]
        yield [*told, f"{percent(left)} / {percent(lost)}", handled(plans)]


def sifter_lines(names: Sequence[str], cards: Mapping[str, Any]) -> Iterator[list[object]]:
    """Yield a line for each sifter: means over the training sets that it met."""
    for name in names:
        about = listed_methods()[name]
        met = [victim for victim in plans_of(cards.get(name)).get("untrusted", []) if "auroc" in victim]
        auroc = f"{statistics.fmean(victim['auroc'] for victim in met):.3f}" if met else "—"
        rates = [percent([victim[rate] for victim in met]) for rate in ("tpr", "fpr")]
        attacks = ", ".join(dict.fromkeys(victim["attack"].split()[0] for victim in met)) or NOTHING
        yield [link(name), about["needs"], f"{about['cost_passes']:g}", auroc, *rates, attacks]


def trainer_lines(names: Sequence[str], cards: Mapping[str, Any]) -> Iterator[list[object]]:
    """Yield a line for each safe trainer: means over the training sets that it met."""
    for name in names:
        about = listed_methods()[name]
        met = [victim for victim in plans_of(cards.get(name)).get("untrusted", []) if "asr" in victim]
        before, left, accuracy = (percent([v[rate] for v in met]) for rate in ("asr_before", "asr", "acc"))
        attacks = ", ".join(dict.fromkeys(victim["attack"].split()[0] for victim in met)) or NOTHING
        yield [link(name), about["needs"], f"{about['cost_passes']:g}", f"{before} → {left}", accuracy, attacks]


def parts(cards: Mapping[str, Any]) -> dict[str, str]:
    """Return the generated parts of the page by name."""
    rooms = {room: [name for name, home in listed_rooms().items() if home == room] for room in ROOMS}
    heads = {
        "attacks": "attack | the attacker | ACC | ASR | seeds | published, CIFAR-10",
        "erasers": "eraser | needs | starts from | passes | digits: ASR left / ACC lost | erased, of all that it met",
        "sifters": "sifter | needs | passes | AUROC | TPR | FPR | training sets met",
        "trainers": "trainer | needs | passes | ASR, plain → this | ACC | training sets met",
    }
    lines = {
        "attacks": attack_lines(rooms["ATTACKS"], cards),
        "erasers": eraser_lines(rooms["PURIFIERS"], cards),
        "sifters": sifter_lines(rooms["SIFTERS"], cards),
        "trainers": trainer_lines(rooms["SAFE_TRAINERS"], cards),
    }
    return {name: table(head, list(lines[name])) for name, head in heads.items()}


def filled(page: str, content: Mapping[str, str]) -> str:
    """Return a page with its generated parts replaced: what stands between ``<!-- matrix NAME -->`` and ``<!-- end -->``."""
    return re.sub(
        r"<!-- matrix (\S+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- matrix {found[1]} -->\n{content[found[1]]}\n<!-- end -->",
        page,
        flags=re.DOTALL,
    )


def write_comparison(root: Path) -> None:
    """Write the generated parts of a repository's page; nothing happens where there is none."""
    page = root / "docs" / "methods.md"
    if page.exists():
        write_text_atomic(page, filled(page.read_text(encoding="utf-8"), parts(read_cards(root / "tests" / "cards"))))


if __name__ == "__main__":
    write_comparison(ROOT)
