"""What a method uses: wall time, image passes, peak memory, trusted images; and when it has to end.

Passes are counted where modules are called, so a method cannot forget them: forward only counts one third of a pass,
forward and backward together count one (the usual two-to-one ratio of backward to forward work).
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from lustral.core.records import Cost


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """When work has to end; what watches it stops soon after.

    Attributes:
        at: reading of the clock, seconds.
        clock: tells the time, seconds from any start; never goes back.
    """

    at: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def after(cls, seconds: float, clock: Callable[[], float] = time.monotonic) -> Deadline:
        """Return the deadline so many seconds from now; raise ``ValueError`` where these are no positive number.

        >>> Deadline.after(20.0, lambda: 100.0).part(0.25).at
        105.0
        """
        if not 0 < seconds < float("inf"):
            raise ValueError(f"expected a time limit in seconds, above 0; got {seconds}")
        return cls(at=clock() + seconds, clock=clock)

    @property
    def left(self) -> float:
        """Seconds from now; 0 or less once it has passed."""
        return self.at - self.clock()

    def part(self, share: float) -> Deadline:
        """Return the deadline of work that may have this share, in (0, 1], of the time left."""
        now = self.clock()
        return Deadline(at=now + share * max(self.at - now, 0.0), clock=self.clock)


class CostMeter:
    """Measures what runs inside its ``with`` block.

    Calls are seen through hooks that belong to the process and not to the model, so a deep copy of a watched model
    carries nothing away; it is not watched either, until ``watch`` is told. A watched module inside another watched
    module counts once. Meters may be nested: each counts everything inside its own block.

    >>> model = nn.Linear(4, 2)
    >>> with CostMeter(model, clean_images=6) as meter:
    ...     loss = model(torch.zeros(6, 4)).sum()
    ...     with torch.no_grad():
    ...         logits = model(torch.zeros(3, 4))
    >>> meter.cost.image_passes
    7.0
    """

    _running: ClassVar[list[CostMeter]] = []

    def __init__(self, model: nn.Module, *, clean_images: int) -> None:
        """Prepare to watch ``model``, for a method that was given ``clean_images`` trusted images."""
        if clean_images < 0:
            raise ValueError(f"expected a non-negative number of clean images; got {clean_images}")
        self._clean_images = clean_images
        self._watched: set[nn.Module] = {model}
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._depth = 0
        self._forwards = 0
        self._forwards_with_backward = 0
        self._peak_memory = 0
        self._start: float | None = None
        self._cost: Cost | None = None
        self._handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        """Count the calls of another module too, e.g. a copy that the method trains."""
        self._watched.add(model)

    @classmethod
    def follow(cls, original: nn.Module, copied: nn.Module) -> None:
        """Make every running meter that watches ``original`` watch a copy of it as well."""
        for meter in cls._running:
            if original in meter._watched:
                meter.watch(copied)

    @property
    def cost(self) -> Cost:
        """What was used: so far while the block runs, the final account afterwards."""
        if self._cost is not None:
            return self._cost
        if self._start is None:
            raise RuntimeError("the meter has not run; use it as `with CostMeter(model, clean_images=n) as meter:`")
        self._synchronise()
        return Cost(
            seconds=time.perf_counter() - self._start,
            image_passes=(self._forwards + 3 * self._forwards_with_backward) / 3,
            peak_memory_bytes=self._read_peak(),
            clean_images=self._clean_images,
        )

    def __enter__(self) -> Self:
        """Start the clock and the count."""
        if self._start is not None:
            raise RuntimeError("a meter measures one block; make a new CostMeter for the next one")
        self._handles = [
            register_module_forward_pre_hook(self._before_call),
            register_module_forward_hook(self._after_call, always_call=True),
        ]
        self._synchronise()
        for meter in self._running:  # the reset below would erase the peak they have seen
            meter._peak_memory = meter._read_peak()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _return_freed_memory()
            _reset_peak_resident()
        self._resident_before = _peak_resident_bytes()
        self._running.append(self)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting, whether or not the block failed."""
        for handle in self._handles:
            handle.remove()
        self._running.remove(self)
        self._cost = self.cost
        self._watched.clear()

    def _before_call(self, module: nn.Module, inputs: Sequence[Any]) -> None:
        self._depth += module in self._watched

    def _after_call(self, module: nn.Module, inputs: Sequence[Any], output: Any) -> None:
        if module not in self._watched:
            return
        self._depth -= 1
        if self._depth > 0 or output is None:  # no output: the call failed
            return
        # torch hands keyword arguments to no hook that also runs after a failure; the logits have as many rows
        images = next((value for value in (*inputs, output) if isinstance(value, Tensor)), None)
        if images is None:
            return
        if isinstance(output, Tensor) and output.requires_grad:
            self._forwards_with_backward += len(images)
        else:
            self._forwards += len(images)

    def _synchronise(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def _read_peak(self) -> int:
        if self._device.type == "cuda":
            return max(self._peak_memory, torch.cuda.max_memory_allocated(self._device))
        return max(self._peak_memory, _peak_resident_bytes() - self._resident_before)


def _return_freed_memory() -> None:
    """Give what is freed back to the system, where the C library can (glibc): else the block would take it for nothing."""
    with suppress(AttributeError, OSError, TypeError):  # no such function, no library, no name for "this process"
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak_resident() -> None:
    """Make the process's peak its present size, where the system can (Linux): else a second method would seem to need nothing."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_resident_bytes() -> int:
    """Return the largest resident size of this process since the last reset, or ever; 0 on Windows, which does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
