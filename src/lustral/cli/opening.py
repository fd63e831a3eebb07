"""From the flags of a command line to what the library opens: a device, and a model with its clean images."""

from __future__ import annotations

import torch

from lustral.api.opening import GivenData, Opened, open_file
from lustral.cli.arguments import Suspect


def pick_device(name: str) -> torch.device:
    """Return the device a user named; "auto" is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's own ways of saying no
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the device {name!r} cannot be used: {reason}; try --device cpu") from error
    return device


def open_suspect(suspect: Suspect, *, seed: int, device: torch.device) -> Opened:
    """Open the model and the data, check that they fit each other, and build the defender's view."""
    given = GivenData(
        clean=suspect.clean, classes=suspect.classes, image_size=suspect.image_size, resize=suspect.resize
    )
    return open_file(suspect.model, suspect.data, given=given, written=vars(suspect.format), seed=seed, device=device)
