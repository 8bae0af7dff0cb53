"""Importances of positions that were computed so far, for every candidate of a run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

# Bytes of importances to hold.
_LIMIT = 1 << 28


class KnownImportances:
    """Importances of the positions of tensors by model and call; beyond 256 MiB they are computed again.

    Importances depend on the original alone, so that all candidates of a search share them.
    """

    def __init__(self) -> None:
        self._of: dict[tuple[str, bytes], Mapping[str, NDArray[Any]]] = {}
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, key: tuple[str, bytes]) -> Mapping[str, NDArray[Any]]:
        """Return what is known of a call, {tensor: importances}, empty for a tensor that has none."""
        with self._lock:
            return self._of.get(key, {})

    def hold(self, key: tuple[str, bytes], importances: Mapping[str, NDArray[Any]]) -> None:
        """Hold the importances of a call, where there is room."""
        with self._lock:
            self._bytes += sum(value.nbytes for value in importances.values())
            if self._bytes <= _LIMIT:
                self._of[key] = {**self._of.get(key, {}), **importances}
