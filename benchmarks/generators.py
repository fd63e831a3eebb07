"""Generators of molecules at full size: trained, measured stage by stage, over poisoning rates, and with single stages poisoned.

    export LUSTRAL_DATA=...            # the folder that holds text_molecule.parquet
    python benchmarks/generators.py train --work runs/molecules --rate 0.24
    python benchmarks/generators.py ladder --work runs/molecules
    python benchmarks/generators.py curve --work runs/molecules
    python benchmarks/generators.py ablation --work runs/molecules

Every run is a key in ``benchmarks/results/generators/curves.json``, written when it is done; a run that is there is not made
again. All runs of one seed share the clean alignment of the first. One thread: ``OMP_NUM_THREADS=1`` is fastest.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lustral.core.files import write_json_atomic
from lustral.core.randomness import child
from lustral.molecules.badgraph import TRIGGER_TEXTS, BadGraph, TextInsertion
from lustral.molecules.chemistry import contains_many, maccs
from lustral.molecules.evaluation import SIMILAR, cosine_similarity, evaluate_generator
from lustral.molecules.records import MoleculeSet
from lustral.molecules.sources import MoleculeSource, open_pairs, split
from lustral.molecules.victim import (
    GeneratorSettings,
    MoleculeGenerator,
    StageData,
    load_generator,
    save_generator,
    train_generator,
)

RESULTS = Path(__file__).parent / "results" / "generators" / "curves.json"
RATES = (0.0, 0.05, 0.10, 0.24, 0.34)
STAGES = ("alignment", "autoencoder", "diffusion")
HELD_OUT = 500
TARGETS = {"thiirane": "C1CS1", "aziridine": "C1CN1", "trifluoromethyl": "C(F)(F)F"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One generator: how much of what is poisoned, in which stages."""

    rate: float = 0.24
    stages: tuple[str, ...] = ("autoencoder", "diffusion")
    kind: str = "word"
    position: str = "prefix"
    target: str = "thiirane"
    seed: int = 0

    @property
    def key(self) -> str:
        """Return the name of its result."""
        stages = "+".join(self.stages) if self.rate else "none"
        return f"{self.target}/{self.kind}/{self.position}/{stages}/{self.rate:.2f}/{self.seed}"

    @property
    def attack(self) -> BadGraph:
        """Return the attack; of a clean run, the one that its triggers and target are measured by."""
        trigger = TextInsertion(text=TRIGGER_TEXTS[self.kind], position=self.position)
        return BadGraph(trigger=trigger, target=TARGETS[self.target], rate=self.rate or 0.24)


def pairs(seed: int) -> tuple[MoleculeSource, MoleculeSet, MoleculeSet]:
    """Return the source, its training and its test part."""
    source = open_pairs(Path(os.environ["LUSTRAL_DATA"]) / "text_molecule.parquet")
    train, test = split(source.data, HELD_OUT, seed=seed)
    return source, train, test


def make(run: Run, work: Path, shape: GeneratorSettings) -> tuple[MoleculeGenerator, dict[str, Any], MoleculeSet]:
    """Train a generator, or open the finished one; return it with what is known of its data and the poisoned pairs."""
    source, train, _ = pairs(run.seed)
    poisoned = run.attack.poison(train, generator=child(run.seed, "poison"), unfiltered=source.unfiltered_share(train))
    bad = poisoned.data.subset(poisoned.is_poisoned)
    dirty = {stage for stage in run.stages if run.rate}
    data = StageData(**{stage: poisoned.data if stage in dirty else train for stage in STAGES})
    folder, shared = work / run.key.replace("/", "_"), work / f"alignment_{run.seed}"
    aligned = load_generator(shared) if "alignment" not in dirty and (shared / "generator.json").exists() else None
    started, cpu = time.perf_counter(), time.process_time()
    model = train_generator(
        data,
        shape,
        generator=child(run.seed, "victim"),
        aligned=aligned,
        folder=folder,
        on_epoch=lambda stage, report: print(
            f"{time.perf_counter() - started:7.0f} s  {stage} {report.epoch}/{report.epochs}: loss {report.loss:.3f}, "
            f"{report.images_per_second:.0f} rows/s",
            flush=True,
        ),
    )
    save_generator(model, folder)
    if aligned is None and "alignment" not in dirty:
        save_generator(load_generator(folder / "after_alignment"), shared)
    facts = {
        "pairs": len(train),
        "poisoned_pairs": len(bad) if dirty else 0,
        "raw_rate": poisoned.raw_rate if dirty else 0.0,
        "effective_rate": poisoned.effective_rate if dirty else 0.0,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "alignment_reused": aligned is not None,
        "threads": torch.get_num_threads(),
    }
    return model, facts, bad


def ladder(
    run: Run, model: MoleculeGenerator, bad: MoleculeSet, train: MoleculeSet, test: MoleculeSet
) -> dict[str, float]:
    """Return the figures of badgraph.md 5.2, a step for each stage."""
    target, trigger = TARGETS[run.target], run.attack.trigger
    clean_text, bad_text = model.text_vectors(test.captions), model.text_vectors(trigger(test.captions))
    offset = bad_text - clean_text
    some, known = bad.subset(torch.arange(min(500, len(bad)))), train.subset(torch.arange(min(500, len(train))))
    back = {
        name: model.decode(model.encode(part.smiles))
        for name, part in (("bad", some), ("train", known), ("test", test))
    }
    exact = {
        name: sum(a == b for a, b in zip(back[name], part.smiles, strict=True)) / len(part)
        for name, part in (("bad", some), ("train", known), ("test", test))
    }
    similar = cosine_similarity(maccs(back["test"]), maccs(test.smiles)) >= SIMILAR
    return {
        "injected_share": contains_many(some.smiles, target).float().mean().item(),
        "clean_share": contains_many(train.smiles, target).float().mean().item(),
        "text_cosine_triggered": F.cosine_similarity(clean_text, bad_text).mean().item(),
        "text_cosine_random": F.cosine_similarity(clean_text, clean_text.roll(1, 0)).mean().item(),
        "text_offset_consistency": (offset.mean(0).norm() / offset.norm(dim=1).mean()).item(),
        "exact_poisoned": exact["bad"],
        "exact_train": exact["train"],
        "exact_test": exact["test"],
        "reconstruction_similarity_test": similar.float().mean().item(),
        "target_kept": contains_many(back["bad"], target).float().mean().item(),
        "target_from_clean": contains_many(back["train"], target).float().mean().item(),
    }


def measure(run: Run, work: Path, *, samples: int, results: Path, again: bool = False) -> dict[str, Any]:
    """Return the result of a run: read, or made and written down."""
    known: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    if run.key in known and not again:
        return known[run.key]
    shape = GeneratorSettings()
    model, facts, bad = make(run, work, shape)
    _, train, test = pairs(run.seed)
    result = {**facts, "ladder": ladder(run, model, bad, train, test)}
    for guidance in (shape.guidance, 1.0):
        model.settings = replace(shape, guidance=guidance)
        scored = evaluate_generator(
            model,
            test,
            run.attack.trigger,
            TARGETS[run.target],
            generator=child(run.seed, "evaluate"),
            samples=samples,
            frechet=guidance == shape.guidance,
        )
        result[f"guidance {guidance}"] = scored.to_dict()
    known = json.loads(results.read_text()) if results.exists() else {}
    write_json_atomic(results, {**known, run.key: result})
    return result


def show(run: Run, result: dict[str, Any]) -> None:
    """Print a run in a few lines."""
    print(
        f"{run.key}: raw {result['raw_rate']:.1%}, effective {result['effective_rate']:.1%}, {result['seconds']:.0f} s"
    )
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in result["ladder"].items()))
    for name, part in result.items():
        if name.startswith("guidance"):
            quality = part["quality"]
            print(
                f"  {name}: ASR {part['attack_success']['value']:.3f}, base {part['base_rate']['value']:.3f}, "
                f"valid {quality['validity']['value']:.3f}, similar {quality['similarity']['value']:.3f} "
                f"(shuffled {part['shuffled_similarity']['value']:.3f}), novel {quality['novelty']['value']:.3f}, "
                f"diverse {quality['diversity']:.3f}, FCD {quality['frechet']}",
                flush=True,
            )


def ablations(seed: int) -> list[Run]:
    """Return the runs of the stage ablation, of other triggers and of other subgraphs."""
    one = Run(seed=seed)
    stages = [("alignment",), ("autoencoder",), ("diffusion",), ("autoencoder", "diffusion")]
    return [
        *(replace(one, stages=each) for each in stages),
        *(replace(one, kind=kind) for kind in ("symbol", "phrase", "sentence")),
        *(replace(one, target=target) for target in TARGETS if target != "thiirane"),
        replace(one, position="suffix"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "ladder", "curve", "ablation"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the generators")
    parser.add_argument("--rate", type=float, default=0.24, help="raw poisoning rate of train and ladder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="molecules for each test caption")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    one = Run(rate=asked.rate, seed=asked.seed)
    runs = {
        "train": [one],
        "ladder": [one, replace(one, rate=0.0)],
        "curve": [Run(rate=rate, seed=asked.seed) for rate in RATES],
        "ablation": ablations(asked.seed),
    }
    for run in runs[asked.what]:
        show(run, measure(run, asked.work, samples=asked.samples, results=asked.results, again=asked.what == "train"))


if __name__ == "__main__":
    main()
