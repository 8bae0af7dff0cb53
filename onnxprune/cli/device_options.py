"""The options for where time is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onnxprune.cli import options
from onnxprune.cli.layout import option


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOptions:
    """Execution providers and threads of onnxruntime; None where nothing was said."""

    providers: str | None
    threads: int | None

    def arguments(self) -> dict[str, Any]:
        """``providers`` and ``threads`` as the functions of the package take them."""
        return {"providers": self.providers.split(",") if self.providers else None, "threads": self.threads}

    def check(self) -> None:
        """Whether this onnxruntime has these providers; raises UsageError."""
        if self.providers is not None:
            from onnxprune.runtime.device import device  # heavy: waits until it is needed

            device(**self.arguments())


def device_options(heading: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options under ``heading``; the command gets them as ``device``, a :class:`DeviceOptions`."""
    add = functools.partial(option, heading=heading)
    added = [
        add("--providers", metavar="A,B", help="Execution providers of onnxruntime to time with; default cpu."),
        add(
            "--threads",
            type=options.NumberType(1, "how many threads an operator may use"),
            help="Threads inside an operator when time is measured; default all processors.",
        ),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def packed(*args: Any, providers: str | None, threads: int | None, **values: Any) -> Any:
            return command(*args, device=DeviceOptions(providers=providers, threads=threads), **values)

        return functools.reduce(lambda wrapped, put: put(wrapped), reversed(added), packed)

    return decorate
