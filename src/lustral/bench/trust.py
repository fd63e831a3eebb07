"""What plans and stores, which may be anyone's, can make us do besides computing: nothing, unless the caller allows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lustral.core.settings import suggest
from lustral.molecules.sources import NAMED
from lustral.vision.models.architecture import code_in
from lustral.vision.sources.loading import source_names


class TrustError(ValueError):
    """A plan or a store asks for something that has to be allowed first; the message says how."""


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What the caller allows a plan or a store to ask for.

    Attributes:
        code: architectures ``FILE.py:function``: building one runs the file.
        paths: data sets by path, or by a download of torchvision's; the names of ``source_names()`` are always open.
    """

    code: bool = False
    paths: bool = False

    def require_data(self, name: str) -> None:
        """Refuse a data set that is more than a name.

        Raises:
            TrustError: it is one, and paths are not allowed.
        """
        if not (self.paths or name in source_names() or name in NAMED):
            raise TrustError(
                f"no data set {name[:200]!r} among the known names{suggest(name[:200], source_names())}; a plan or a store "
                "opens no path and starts no download by itself: look at it, then add --allow-paths"
            )

    def require_code(self, spec: Any) -> None:
        """Refuse plain data that names Python code anywhere, also in the settings of an attack.

        Raises:
            TrustError: it does, and code is not allowed.
        """
        if not self.code and (found := next(code_in(spec), None)) is not None:
            raise TrustError(
                f"the architecture {found[:200]!r} is Python code, and a plan or a store runs none by itself: look at the "
                "file, then add --allow-code"
            )

    def require(self, spec: Mapping[str, Any]) -> None:
        """Check a cell's specification: see ``require_code`` and ``require_data``."""
        self.require_code({name: part for name, part in spec.items() if name != "data"})
        for part in spec.values():
            if isinstance(part, Mapping) and "kind" in part:
                self.require(part)  # a cell that it needs
        if "data" in spec:
            self.require_data(spec["data"]["name"])
