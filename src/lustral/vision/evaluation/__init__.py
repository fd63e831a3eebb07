"""Measuring: the one part of the library that sees a defence's result, the true trigger and the test set together."""

from lustral.vision.evaluation.metrics import (
    AttackMetrics,
    accuracy,
    attack_metrics,
    clean_accuracy,
    der,
    per_class_accuracy,
    predict,
    rir,
)
from lustral.vision.evaluation.oracle import oracle_round
from lustral.vision.evaluation.protocol import Evaluation, compare_evaluations, evaluate, unmet_criteria
from lustral.vision.evaluation.reactivation import Controls, Reactivation, resistance
from lustral.vision.evaluation.sifting import SiftingRates, auprc, auroc, score_histogram, sifting_rates
from lustral.vision.evaluation.task import TaskCheck, UnfitModel, check_task, require_gradient, require_task
from lustral.vision.evaluation.trap import TrapEvaluation, evaluate_trap, reconstruction_error

__all__ = [
    "AttackMetrics",
    "Controls",
    "Evaluation",
    "Reactivation",
    "SiftingRates",
    "TaskCheck",
    "TrapEvaluation",
    "UnfitModel",
    "accuracy",
    "attack_metrics",
    "auprc",
    "auroc",
    "check_task",
    "clean_accuracy",
    "compare_evaluations",
    "der",
    "evaluate",
    "evaluate_trap",
    "oracle_round",
    "per_class_accuracy",
    "predict",
    "reconstruction_error",
    "require_gradient",
    "require_task",
    "resistance",
    "rir",
    "score_histogram",
    "sifting_rates",
    "unmet_criteria",
]
