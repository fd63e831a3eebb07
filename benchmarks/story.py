"""Make a folder of real pictures with poisoned ones planted in it, and measure what ``lustral sift`` lists of them.

    python benchmarks/story.py make --data tinyimagenet10 --out runs/story --images 3000 --poisoned 150
    lustral sift runs/story/pictures --out runs/story/sifted --write-clean runs/story/left
    python benchmarks/story.py measure --truth runs/story/truth.json --scores runs/story/sifted/scores.parquet
    lustral train runs/story/left --method plain --test runs/story/test --out runs/story/model
    python benchmarks/story.py evaluate --truth runs/story/truth.json --model runs/story/model/model.safetensors

The truth stands in a file beside the folder, never in it; names of files tell nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Generator

from lustral.core.randomness import child
from lustral.vision.attacks import BadNets
from lustral.vision.images import as_float, as_uint8, stratified_indices
from lustral.vision.models import load_model
from lustral.vision.records import ImageSet
from lustral.vision.sources import load_source


def make(
    data: str,
    out: Path,
    *,
    images: int,
    poisoned: int,
    target: int,
    seed: int,
    patch: int,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Write out/pictures/CLASS/*.png, out/clean/CLASS/*.png (the reserve), out/test/CLASS/*.png and out/truth.json.

    Returns:
        The truth: the names of the planted files, relative to the folder, and how they were made.
    """
    source = load_source(data, image_size=image_size)
    train, reserve = source.training_split()
    chosen, rest = stratified_indices(
        train.labels, train.num_classes, images - poisoned, generator=child(seed, "images")
    )
    victims = rest[train.labels[rest] != target]
    victims = victims[torch.randperm(len(victims), generator=child(seed, "victims"))[:poisoned]]
    if len(victims) < poisoned:
        raise SystemExit(f"{data} has {len(train)} images: too few for {images} with {poisoned} planted ones")
    stamp = BadNets(target_label=target, size=patch).trigger(train.image_shape)
    names = class_names(train)
    naming = child(seed, "names")
    write(out / "pictures", train.subset(chosen), names, naming)
    before = set((out / "pictures").rglob("*.png"))
    planted = as_uint8(stamp(as_float(train.images[victims])))
    labels = torch.full((poisoned,), target)
    write(out / "pictures", ImageSet(images=planted, labels=labels, num_classes=train.num_classes), names, naming)
    files = sorted(str(p.relative_to(out / "pictures")) for p in set((out / "pictures").rglob("*.png")) - before)
    write(out / "clean", reserve, names, naming)
    if source.test is not None:
        write(out / "test", source.test, names, naming)
    truth = {"data": data, "target": names[target], "images": images, "planted": files, "seed": seed, "patch": patch}
    (out / "truth.json").write_text(json.dumps(truth, indent=1), encoding="utf-8")
    return truth


def class_names(data: ImageSet) -> list[str]:
    names = list(data.class_names) or [f"{label:03}" for label in range(data.num_classes)]
    return [name.replace("/", "_") for name in names]


def write(folder: Path, data: ImageSet, names: list[str], naming: Generator) -> None:
    """Write pictures under names that are drawn from a stream: they tell nothing, and one seed gives one folder."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for image, label in zip(data.images, data.labels.tolist(), strict=True):
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(
            folder / names[label] / f"{int(torch.randint(2**48, (), generator=naming)):012x}.png"
        )


def measure(truth: Mapping[str, Any], scores: Path) -> dict[str, float]:
    """Return precision and recall of the list, and how many images it has."""
    table = pq.read_table(scores).to_pydict()
    listed = {file for file, flagged in zip(table["file"], table["flagged"], strict=True) if flagged}
    planted = set(truth["planted"])
    hits = len(listed & planted)
    return {
        "listed": len(listed),
        "planted": len(planted),
        "precision": hits / max(len(listed), 1),
        "recall": hits / max(len(planted), 1),
        "false_alarm_rate": (len(listed) - hits) / max(truth["images"] - len(planted), 1),
    }


def evaluate(truth: Mapping[str, Any], model_file: Path, test_folder: Path) -> dict[str, float]:
    """Return a model's accuracy, and how many of the other classes' pictures it calls the target, with the mark and without."""
    test = load_source(str(test_folder)).train
    assert isinstance(test, ImageSet)
    model = load_model(model_file, num_classes=test.num_classes, image_shape=test.image_shape).model.eval()
    target = class_names(test).index(truth["target"])
    stamp = BadNets(target_label=target, size=truth["patch"]).trigger(test.image_shape)
    right = called = called_plain = others = 0
    with torch.inference_mode():
        for batch in test.batches(512):
            answers, is_other = model(batch.inputs).argmax(1), batch.labels != target
            right += int((answers == batch.labels).sum())
            others += int(is_other.sum())
            called_plain += int((answers[is_other] == target).sum())
            called += int((model(stamp(batch.inputs)).argmax(1)[is_other] == target).sum())
    return {"accuracy": right / len(test), "attack_success": called / others, "without_the_mark": called_plain / others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make")
    making.add_argument("--data", default="tinyimagenet10")
    making.add_argument("--out", type=Path, required=True)
    making.add_argument("--images", type=int, default=3000)
    making.add_argument("--poisoned", type=int, default=150)
    making.add_argument("--target", type=int, default=0)
    making.add_argument("--patch", type=int, default=3, help="pixels of the side of the white square")
    making.add_argument("--image-size", type=int)
    making.add_argument("--seed", type=int, default=0)
    measuring = verbs.add_parser("measure")
    measuring.add_argument("--truth", type=Path, required=True)
    measuring.add_argument("--scores", type=Path, required=True)
    evaluating = verbs.add_parser("evaluate")
    evaluating.add_argument("--truth", type=Path, required=True)
    evaluating.add_argument("--model", type=Path, required=True)
    given = vars(parser.parse_args())
    verb = given.pop("verb")
    if verb == "make":
        truth = make(given.pop("data"), given.pop("out"), **given)
        print(f"{truth['images']} pictures, {len(truth['planted'])} of them planted in class {truth['target']}")
    else:
        truth = json.loads(given["truth"].read_text(encoding="utf-8"))
        if verb == "measure":
            found = measure(truth, given["scores"])
        else:
            found = evaluate(truth, given["model"], given["truth"].parent / "test")
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
