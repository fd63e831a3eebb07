"""The whole way through the public functions: implant, save, open, scan, erase, evaluate, report."""

from __future__ import annotations

from pathlib import Path

from lustral.core.randomness import child
from lustral.vision.erasing import erase
from lustral.vision.evaluation import compare_evaluations, evaluate
from lustral.vision.purifiers import BaEraser
from lustral.vision.records import DefenderView, Victim
from lustral.vision.victims import load_victim, save_victim
from toy import gentle_trainer, quick_detector, quick_inverter, toy_images


def test_a_backdoor_is_planted_found_erased_and_seen_to_be_gone(backdoored: Victim, tmp_path: Path) -> None:
    clean, test = toy_images(280, seed=2), toy_images(420, seed=1)
    save_victim(tmp_path / "victim", backdoored, clean)
    victim = load_victim(tmp_path / "victim")
    before = evaluate(victim, None, test, generator=child(0))
    assert before.acc.value >= 0.95
    assert before.asr.value >= 0.95

    view = DefenderView(model=victim.model, clean=clean)
    verdict = quick_detector().inspect(view, generator=child(1))
    assert (verdict.outcome, verdict.suspect_labels) == ("backdoored", (4,))

    eraser = BaEraser(inverter=quick_inverter(), trainer=gentle_trainer(), least_steps=1, rounds=2)
    scanned = DefenderView(model=victim.model, clean=clean, verdict=verdict)
    purified = erase(eraser, scanned, detector=quick_detector(), generator=child(1))
    assert purified.verdict is verdict
    assert purified.audit is not None
    assert purified.audit.suspect_labels == ()

    after = evaluate(victim, purified.model, test, generator=child(0))
    assert after.asr.value < 0.1
    assert after.acc.value >= before.acc.value - 0.03
    assert after.ra.value > 0.8
    assert compare_evaluations(before, after)["erased"] is True
    assert evaluate(victim, None, test, generator=child(0)) == before  # the victim is as it was
