"""The model that a sifter looks at: the caller's, or one trained plainly on the untrusted set."""

from __future__ import annotations

import copy

import torch
from torch import Generator, nn

from lustral.core.randomness import fork
from lustral.core.records import OnProgress
from lustral.training import Trainer
from lustral.vision.records import TrainingView

STAGE = "training a model to look at"
LEAST_STEPS = (
    450  # of 128 images: so often a trigger has to be seen; 3,000 images with 150 poisoned ones need 20 epochs, not 6
)


def scoring_recipe(num_images: int) -> Trainer:
    """Return how the model is trained: briefly, and without augmentation.

    Crops and flips smear a trigger, and long training fits odd clean images one by one: both hide poisoned images. Of BadNets at
    5 % of 10,000 CIFAR-10 images, Spectral Signatures find 66 % after 6 epochs so, and 0 after 10 epochs with crops and flips.
    """
    return Trainer(epochs=2, batch_size=128, learning_rate=0.1).fitted_to_size(num_images, LEAST_STEPS)


def estimated_passes(num_images: int, *, trainer: Trainer | None, looks: float = 1.0) -> float:
    """Return how many image passes it takes to train a model on a set and to look at each of its images ``looks`` times.

    >>> round(estimated_passes(50_000, trainer=None))
    116667
    """
    recipe = trainer or scoring_recipe(num_images)
    return num_images * (recipe.epochs + looks / 3)


def plain_model(
    view: TrainingView, *, generator: Generator, trainer: Trainer | None = None, on_progress: OnProgress | None = None
) -> nn.Module:
    """Return the view's model, or one trained on all of the untrusted set; that one has learnt the backdoor, if there is any.

    Args:
        view: the untrusted set, and a model where the caller has one.
        generator: stream of the weights and the training.
        trainer: how to train; None is ``scoring_recipe``.
        on_progress: called on the way.
    """
    if view.model is not None:
        return view.model
    recipe = trainer or scoring_recipe(len(view.untrusted))
    return recipe.fit(
        view.build_model(fork(generator, "weights")),
        view.untrusted,
        generator=fork(generator, "training"),
        on_progress=on_progress,
        stage=STAGE,
    )


def untrained_copy(model: nn.Module, *, generator: Generator) -> nn.Module:
    """Return a copy of a model with new weights, for whoever has a trained model and not the code that builds one.

    Every module that has ``reset_parameters``, as convolutions, linear layers and normalisations of torch do, draws its weights
    and forgets its statistics. What another module holds by itself, as the class token of a transformer, stays as it was trained.

    Args:
        model: classifier; unchanged.
        generator: CPU stream of the weights.

    Returns:
        The copy in training mode, on the same device, every parameter taking a gradient.

    Raises:
        ValueError: no module can.
    """
    fresh = copy.deepcopy(model).train().requires_grad_(True)
    modules = [module for module in fresh.modules() if callable(getattr(module, "reset_parameters", None))]
    if not modules:
        raise ValueError("expected a network with layers that can draw new weights (`reset_parameters`); found none")
    devices = {parameter.device for parameter in fresh.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        for module in modules:
            module.reset_parameters()  # type: ignore[operator]
    return fresh
