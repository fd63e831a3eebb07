"""The verbs of the library: what they give is what the command line gives, and the model given stays as it is."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

import lustral
from lustral.api.data import open_data
from lustral.cli import main
from lustral.exchange.schemas import schema_of
from lustral.vision.attacks import BadNets
from lustral.vision.detectors import MaskArea
from lustral.vision.evaluation.task import UnfitModel
from lustral.vision.inverters import MaskSearch, MaxEntropy
from lustral.vision.models import Classifier, LoadedModel, save_model
from lustral.vision.models.networks.small_cnn import SmallCNN
from lustral.vision.purifiers import BNRefresh
from lustral.vision.records import DefenderView, ImageSet, Purified, Verdict, Victim
from lustral.vision.safe_training import PlainTraining
from lustral.vision.verdict_files import VerdictError
from lustral.vision.victims import implant, save_victim
from toy import CornerSifter, mask_verdict, toy_images, toy_trainer, true_trigger

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLEAN = toy_images(140, seed=2)


class Known:
    """A detector that says what it is told, without a search."""

    def inspect(self, view: Any, *, generator: Any, on_progress: Any = None) -> Verdict:
        torch.rand(1, generator=generator)
        return mask_verdict([40.0, 41.0, 42.0, 43.0, 4.0, 44.0, 45.0], (4,), triggers=(true_trigger(),))


@pytest.fixture(scope="module")
def victim() -> Victim:
    train, test = toy_images(700, seed=0), toy_images(140, seed=1)
    attack = BadNets(target_label=4, size=2, poison_rate=0.1)
    return implant(
        attack, train, test, arch="small_cnn:width=8", trainer=toy_trainer(epochs=6), seed=0, data_name="toy"
    )


@pytest.fixture
def model(victim: Victim) -> Classifier:
    found = copy.deepcopy(victim.model)
    assert isinstance(found, Classifier)
    return found


@pytest.fixture
def plain(model: Classifier) -> nn.Module:
    """The same network as a stranger has it: normalised by constants that stand in his own code."""
    return model.network


def require_described(command: str, folder: Path) -> None:
    """Hold what a result wrote against the published description of what the command line writes."""
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema_of(command)).validate(record)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_a_plain_network_is_copied_wrapped_and_stays_as_it_is(plain: nn.Module, model: Classifier) -> None:
    plain.train()
    before = weights(plain)
    result = lustral.scan(plain, CLEAN, method=Known())
    assert plain.training
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert isinstance(result.model, Classifier)
    assert result.model.network is not plain
    assert result.outcome == "backdoored"
    assert result.verdict.notes[0].startswith("No mean and std were given. Of 6 usual normalisations, ")
    own = [part.flatten().tolist() for part in (model.normalise.mean, model.normalise.std)]
    assert lustral.scan(plain, CLEAN, method=Known(), mean=own[0], std=own[1]).verdict.notes == ()


def test_a_scan_is_that_of_the_command_line(
    model: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, data = tmp_path / "model.safetensors", tmp_path / "pool.npz"
    save_model(file, model, arch="small_cnn:width=8", image_shape=(3, 12, 12))
    np.savez(data, images=CLEAN.images.numpy(), labels=CLEAN.labels.numpy())
    quick = ["--search.steps", "4", "--search.batch-size", "8", "--steps", "2", "--hidden", "4", "--samples", "3"]
    main(
        [
            "scan",
            str(file),
            "--method",
            "mask_area",
            "--data",
            str(data),
            "--clean",
            "70",
            "--device",
            "cpu",
            "--json",
            "--quiet",
            *quick,
        ]
    )
    theirs = json.loads(capsys.readouterr().out)
    inverter = MaxEntropy(steps=2, hidden=4, samples=3, search=MaskSearch(steps=4, batch_size=8))
    opened = lustral.open_model(file)
    for given in (opened, file):
        ours = lustral.scan(given, data, clean=70, method=MaskArea(inverter=inverter)).to_dict()
        for record in (ours, theirs):
            record["verdict"].pop("cost", None)
        assert json.loads(json.dumps(ours["verdict"])) == theirs["verdict"]
        assert {key: ours[key] for key in ("sha256", "arch", "settings", "seed")} == {
            key: theirs[key] for key in ("sha256", "arch", "settings", "seed")
        }


def test_a_scan_is_saved_and_handed_on(plain: nn.Module, tmp_path: Path) -> None:
    found = lustral.scan(plain, CLEAN, method=Known())
    folder = found.save(tmp_path / "scan")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("report.html", "result.json", "trigger-class-4.png", "triggers.safetensors")
    ]
    require_described("scan", folder)
    assert found.report(tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    shown = found._repr_html_()
    assert "This model is backdoored" in shown
    assert shown.count("<img") > 6
    assert found.verdict.notes[0] in shown
    erased = [
        lustral.erase(plain, CLEAN, verdict=verdict, method=KnownEraser(), detector=Known(), audit=False)
        for verdict in (found, found.verdict, folder, folder / "result.json")
    ]
    assert [len(result.purified.verdict.triggers) for result in erased if result.purified.verdict] == [1] * 4
    assert erased[0].about["mean"] == pytest.approx(found.about["mean"])
    with torch.no_grad():
        next(plain.parameters()).add_(1e-3)
    with pytest.raises(VerdictError, match="of another model"):
        lustral.erase(plain, CLEAN, verdict=found, method=KnownEraser(), detector=Known())
    with pytest.raises(ValueError, match="bn_refresh starts from no scan"):
        lustral.erase(plain, CLEAN, verdict=found, method="bn_refresh")


class KnownEraser(BNRefresh):
    """An eraser that starts from a scan, as short as it gets."""

    takes_verdict = True

    def purify(self, view: DefenderView, **rest: Any) -> Purified:
        return replace(super().purify(view, **rest), verdict=view.require_verdict())


def test_an_erased_network_comes_back_under_its_own_keys(plain: nn.Module, tmp_path: Path) -> None:
    before = weights(plain)
    result = lustral.erase(plain, CLEAN, method="bn_refresh")
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert result.purified.notes[0].startswith("No mean and std were given")
    folder = result.save(tmp_path / "erased")
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt", "report.html", "result.json"]
    require_described("erase", folder)
    fresh = SmallCNN(num_classes=7, width=8)
    fresh.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in result.network.state_dict().items())
    assert json.loads((folder / "result.json").read_text())["written"] == str(folder / "model.pt")
    again = lustral.scan(result, CLEAN, method=Known())
    assert again.verdict.notes == ()  # its normalisation is known
    assert result.finding.headline in result._repr_html_()


def test_an_opened_file_comes_back_as_it_was(model: Classifier, tmp_path: Path) -> None:
    file = tmp_path / "theirs.safetensors"
    save_model(file, model, arch="small_cnn:width=8", image_shape=(3, 12, 12))
    opened = lustral.open_model(file, device="cpu")
    assert isinstance(opened, LoadedModel)
    folder = lustral.erase(opened, CLEAN, method="bn_refresh").save(tmp_path / "erased")
    again = lustral.open_model(folder / "model.safetensors")
    assert again.arch == opened.arch
    assert again.model.normalise.mean.tolist() == opened.model.normalise.mean.tolist()


def test_a_victim_is_measured_with_its_true_trigger(victim: Victim, plain: nn.Module, tmp_path: Path) -> None:
    test = toy_images(140, seed=1)
    save_victim(tmp_path / "victim", victim, test)
    result = lustral.evaluate(tmp_path / "victim", test, victim=tmp_path / "victim")
    assert result.before is not None
    assert result.before.to_dict() == result.after.to_dict()
    assert result.after.asr.value == pytest.approx(victim.metrics["asr"]["value"], abs=0.02)
    assert "With the true trigger" in result._repr_html_()
    page = (result.save(tmp_path / "out") / "report.html").read_text(encoding="utf-8")
    require_described("evaluate", tmp_path / "out")
    assert "Measured with the attacker" in page
    alone = lustral.evaluate(plain, test)
    assert alone.accuracy > 0.9
    assert alone.notes[0].startswith("No mean and std")
    page = alone.report(tmp_path / "alone.html").read_text(encoding="utf-8")
    assert "Measured on clean images" in page
    assert "Attack success" not in page


def test_a_model_that_does_not_fit_is_refused_with_a_reason(plain: nn.Module, model: Classifier) -> None:
    grey = ImageSet(images=CLEAN.images[:, :1], labels=CLEAN.labels, num_classes=7)
    assert lustral.scan(plain, grey, method=Known()).clean.image_shape == (3, 12, 12)  # channels follow the network
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        ("model.xyz", CLEAN, {}, "no such model file"),
        (7, CLEAN, {}, "expected a torch.nn.Module, what lustral.open_model returned"),
        (nn.Sequential(nn.Flatten(), nn.Linear(99, 7)), CLEAN, {}, r"does not take images of shape \(3, 12, 12\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 5)), CLEAN, {}, "gives 5 logits, one per class; the data have 7"),
        (plain, CLEAN, {"mean": MEAN}, "expected mean and std together"),
        (model, CLEAN, {"mean": MEAN, "std": STD}, "a Classifier has its own normalisation"),
        (plain, CLEAN, {"method": "mask_aera"}, "unknown detector 'mask_aera'; did you mean 'mask_area'"),
        (plain, CLEAN, {"method": MaskArea}, r"or an object with inspect\(...\) such as Cascade\(\)"),
        (plain, CLEAN, {"classes": ("a", "b")}, "do not name their classes"),
    ]
    for given, data, more, said in cases:
        with pytest.raises((ValueError, TypeError, OSError), match=said):
            lustral.scan(given, data, **{"method": Known(), **more})


def test_data_that_show_few_classes_take_the_rest_from_the_model(plain: nn.Module) -> None:
    few = CLEAN.subset(CLEAN.labels < 3)
    result = lustral.scan(plain, (few.images, few.labels), method=Known())
    assert result.clean.num_classes == 7


def test_a_model_that_does_not_do_its_task_is_said_to(plain: nn.Module) -> None:
    wrong = ImageSet(images=CLEAN.images, labels=(CLEAN.labels * 3 + 1) % 7, num_classes=7)
    assert lustral.scan(plain, wrong).outcome == "cannot tell"
    with pytest.raises(UnfitModel, match="nothing was changed: the model is right on"):
        lustral.erase(plain, wrong, method="bn_refresh")
    assert any("wrong normalisation, class order or data?" in note for note in lustral.evaluate(plain, wrong).notes)


def test_progress_goes_to_standard_error_or_to_the_caller(plain: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    stages: list[str] = []
    quiet = lustral.erase(plain, CLEAN, method="bn_refresh", on_progress=lambda report: stages.append(report.stage))
    assert capsys.readouterr() == ("", "")
    assert stages
    loud = lustral.erase(plain, CLEAN, method="bn_refresh", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert stages[0] in err
    same = zip(quiet.network.state_dict().values(), loud.network.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in same)


def stamped() -> ImageSet:
    images = CLEAN.images.clone()
    images[:20, :, -2:, -2:] = 255
    return ImageSet(images=images, labels=CLEAN.labels, num_classes=7)


def corner() -> CornerSifter:
    return CornerSifter(trainer=toy_trainer(epochs=1))


def test_a_set_is_sifted_shown_and_written_without_what_was_listed(tmp_path: Path) -> None:
    torch.manual_seed(5)
    result = lustral.sift(stamped(), method=corner(), arch=lambda: SmallCNN(num_classes=7, width=4))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)  # the process's stream stays where it is
    assert result.flagged.sum() == 20
    assert len(result.kept) == 120
    assert result.opened.arch.endswith("SmallCNN")
    folder = result.save(tmp_path / "sifted")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("report.html", "result.json", "scores.csv", "scores.parquet", "sheet.png")
    ]
    require_described("sift", folder)
    assert result.write_clean(tmp_path / "left") == 120
    assert open_data(tmp_path / "left" / "clean.npz").source.train.labels.shape == (120,)
    assert "20 of 140 images look poisoned" in result._repr_html_()
    assert "image 0" not in result.report(tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_model_is_trained_on_a_set(tmp_path: Path) -> None:
    short = PlainTraining(trainer=toy_trainer(epochs=2))
    result = lustral.train(stamped(), method=short, test=toy_images(70, seed=9), arch="small_cnn:width=4")
    assert result.accuracy is not None
    assert result.accuracy.total == 70
    folder = result.save(tmp_path / "trained")
    require_described("train", folder)
    assert lustral.open_model(folder / "model.safetensors").arch == "small_cnn:width=4"
    assert json.loads((folder / "result.json").read_text())["model"] == str(folder / "model.safetensors")
    own = lustral.train(stamped(), method=short, arch=lambda: SmallCNN(num_classes=7, width=4))
    assert sorted(path.name for path in own.save(tmp_path / "own").iterdir()) == [
        *("model.pt", "report.html", "result.json")
    ]
    assert "A model was trained on all 140 images" in own._repr_html_()
    with pytest.raises(ValueError, match="gives 5 logits; expected 7"):
        lustral.train(stamped(), method=short, arch=lambda: SmallCNN(num_classes=5, width=4))
