"""Where a model's time is measured: execution providers, threads, and what tells one machine from another."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from onnxprune.errors import UsageError, argument, nearest
from onnxprune.settings import checked

CPU = "CPUExecutionProvider"
_SUFFIX = "ExecutionProvider"
_PACKAGES = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "nvtensorrtrtx": "onnxruntime-trt-rtx",
    "openvino": "onnxruntime-openvino",
    "dml": "onnxruntime-directml",
    "qnn": "onnxruntime-qnn",
    "rocm": "onnxruntime-rocm",
    "migraphx": "onnxruntime-migraphx",
    "cann": "onnxruntime-cann",
    "webgpu": "onnxruntime-webgpu",
    "coreml": "onnxruntime",
}
"""The package that brings a provider."""
_PLATFORMS = {"coreml": "macOS"}
_INSTEAD = "pip uninstall onnxruntime && pip install {}"


@dataclass(frozen=True, slots=True)
class Device:
    """How to run a model when its time counts.

    Attributes:
        providers: of onnxruntime, in order of preference. threads: inside an operator.
    """

    providers: tuple[str, ...] = (CPU,)
    threads: int = 1

    def facts(self) -> dict[str, str | int]:
        """What a measured time depends on besides the model."""
        return {
            "machine": platform.machine(),
            "processor": _processor(),
            "onnxruntime": ort.__version__,
            "providers": ",".join(self.providers),
            "threads": self.threads,
        }


def device(providers: Sequence[str] | None = None, threads: int | None = None) -> Device:
    """A device from what a user says: ``cuda`` stands for ``CUDAExecutionProvider``; the CPU comes last by itself.

    Args:
        providers: None for the CPU. threads: None for all processors that this process may use.

    Raises:
        UsageError: this onnxruntime has no such provider, or threads is no whole number from 1.
    """
    checked("threads", threads)
    checked("providers", providers)
    known = {name.removesuffix(_SUFFIX).lower(): name for name in ort.get_available_providers()}
    found = []
    for given in providers or ():
        name = known.get(given.strip().removesuffix(_SUFFIX).lower())
        if name is None:
            raise _no_provider(given, known)
        found.append(name)
    return Device(tuple(dict.fromkeys([*found, CPU])), threads or processors())


def _no_provider(given: str, known: Mapping[str, str]) -> UsageError:
    """The error for a provider that is not there: the package that brings it, else the nearest name."""
    message = f"{argument('providers')}: this onnxruntime has no provider {given!r}"
    name = given.strip().removesuffix(_SUFFIX).lower()
    every = {other.removesuffix(_SUFFIX).lower() for other in ort.get_all_providers()} | _PACKAGES.keys()
    if name not in every:
        return UsageError(message, hint=nearest(name, every))
    here = f"This one has {', '.join(sorted(known))}."
    package = _PACKAGES.get(name)
    if package is None:
        return UsageError(message, hint=f"{here} It needs a build of onnxruntime with this provider.")
    if package == "onnxruntime":
        return UsageError(message, hint=f"{here} The provider comes with onnxruntime on {_PLATFORMS[name]} only.")
    return UsageError(message, hint=f"{here} Install {package} in place of onnxruntime: {_INSTEAD.format(package)}.")


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.node()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware", "cpu model"):
            return value.strip()
    return platform.processor() or platform.node()
