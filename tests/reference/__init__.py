"""Published erasers written down plainly, as their code computes: slow, obvious, and what ours are compared with.

``tests/test_reference.py`` compares them step by step; ``benchmarks/eraser_speed.py`` takes their time, with
``PYTHONPATH=tests``. Everything is float32 in contiguous memory; what the published code computes twice is computed twice.
"""

from __future__ import annotations

from reference.i_bau import i_bau
from reference.neural_polarizer import neural_polarizer
from reference.sau import sau
from reference.tsbd import fine_tuned, reset_most_moved, tsbd, unlearned

__all__ = ["fine_tuned", "i_bau", "neural_polarizer", "reset_most_moved", "sau", "tsbd", "unlearned"]
