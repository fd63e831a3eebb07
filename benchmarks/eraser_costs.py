"""How many passes each eraser makes over its clean images: what `lustral erase --list` says.

    python benchmarks/eraser_costs.py           # all
    python benchmarks/eraser_costs.py cnpd sau  # these anew, the others as they were measured

Passes of one image through the network, forward and back, per clean image; a forward pass alone is a third. They depend on the
settings and on the number of clean images (2,500 here, drawn from the embedded digits with replacement), hardly on the network,
so a small one serves. What ends early (bisections, searches, unlearning) makes them vary by a fifth between victims. What takes
the training set gets 50,000 images of it, poisoned at 10 %, drawn likewise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from lustral.api.methods import default_detector
from lustral.catalog import PURIFIERS
from lustral.core.files import write_json_atomic
from lustral.core.randomness import child
from lustral.training import default_trainer
from lustral.vision.attacks import BadNets
from lustral.vision.erasing import erase
from lustral.vision.records import DefenderView
from lustral.vision.sources import load_source
from lustral.vision.victims import implant

RESULT = Path(__file__).resolve().parent / "results" / "eraser_costs.json"
CLEAN = 2500
UNTRUSTED = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("methods", nargs="*", choices=[[], *PURIFIERS], metavar="METHOD", help="all if left out")
    chosen = parser.parse_args().methods
    torch.set_num_threads(1)
    source = load_source("digits")
    assert source.test is not None
    train, _ = source.training_split()
    trainer = dataclasses.replace(default_trainer(flip=False, num_images=len(train)), epochs=12)
    victim = implant(
        BadNets(target_label=3, poison_rate=0.1),
        train,
        source.test,
        arch="small_cnn:width=8",
        trainer=trainer,
        seed=0,
        data_name="digits",
    )
    drawn = torch.randint(len(train), (CLEAN,), generator=child(0, "clean"))
    assert victim.poisoned is not None
    again = torch.randint(len(train), (UNTRUSTED,), generator=child(0, "untrusted"))
    untrusted = victim.poisoned.data.subset(again)
    view = DefenderView(model=victim.model, clean=train.subset(drawn), untrusted=untrusted)
    passes = json.loads(RESULT.read_text())["passes"] if chosen else {}
    for name in chosen or PURIFIERS:
        purifier = PURIFIERS[name]()
        cost = erase(purifier, view, detector=default_detector(purifier), generator=child(0, "erase")).cost
        passes[name] = round(cost.image_passes / CLEAN, 1)
        print(f"{name:18} {passes[name]:7.1f} passes {cost.seconds:7.1f} s", flush=True)
    write_json_atomic(RESULT, {"clean_images": CLEAN, "passes": dict(sorted(passes.items()))})


if __name__ == "__main__":
    main()
