"""Devices under their public name: the multiples of channels that their kernels like, for ``round_to="auto"``.

>>> import onnxprune as op
>>> op.devices.get("avx512").writes
16
>>> op.devices.register(op.devices.Kernels("mine", writes=32, reads=8))

Afterwards ``device="mine"``, and ``--device mine`` where a package announces it (entry point group
``onnxprune.devices``). A JSON file of the same names does as well: ``--device mine.json``.
"""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from onnxprune.errors import UsageError, argument
from onnxprune.plugins import Named

__all__ = ["Kernels", "get", "names", "register", "this_machine", "unregister"]


def __dir__() -> list[str]:
    return [*__all__]


ENTRY_POINT = "onnxprune.devices"


@dataclass(frozen=True, slots=True)
class Kernels:
    """Multiples of channels that the kernels of a device like, each 1 or more.

    Attributes:
        name: value of ``--device``.
        writes: of the channels that a convolution writes.
        reads: of the channels that it reads.
        depthwise: of the channels of a depthwise convolution.
        grouped: of the channels that each group of another grouped convolution reads and writes.
        features: of the features that a matrix product, or a recurrent layer, writes.
        inner: of the features that a matrix product sums over.
        int8: other multiples for quantized layers, by these names.
        source: origin of the rule.
    """

    name: str
    writes: int = 8
    reads: int = 4
    depthwise: int = 8
    grouped: int = 8
    features: int = 8
    inner: int = 4
    int8: Mapping[str, int] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        for name, value in [*((n, getattr(self, n)) for n in MULTIPLES), *self.int8.items()]:
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if name not in MULTIPLES:
                raise UsageError(f"device {self.name!r}: no multiple is called {name!r}", hint=_FIELDS)
            if not is_integer or value < 1:
                raise UsageError(f"device {self.name!r}: {name} is {value!r}", hint="Give a whole number from 1.")

    def of(self, kind: str, *, quantized: bool) -> int:
        """Return the multiple of one of :data:`MULTIPLES`, for a quantized layer or another."""
        return int(self.int8.get(kind, getattr(self, kind)) if quantized else getattr(self, kind))

    @classmethod
    def load(cls, path: str | Path) -> Kernels:
        """Read the multiples of a JSON file, an object with the names of the attributes; the rest has its default.

        Raises:
            UsageError: the file cannot be read or holds something else.
        """
        try:
            multiples = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{argument('device')}: cannot read {str(path)!r}: {error}", hint=_FIELDS) from error
        names = {f.name for f in fields(cls)}
        if (
            not isinstance(multiples, dict)
            or not multiples.keys() <= names
            or not isinstance(multiples.get("int8", {}), dict)
        ):
            raise UsageError(f"{argument('device')}: {str(path)!r} holds no multiples of a device", hint=_FIELDS)
        return cls(**{"name": Path(path).stem, **multiples})


MULTIPLES = ("writes", "reads", "depthwise", "grouped", "features", "inner")
_FIELDS = f'An object with any of name, {", ".join(MULTIPLES)}, int8 and source, such as {{"writes": 16}}.'


def _uniform(name: str, multiple: int, source: str, **others: Any) -> Kernels:
    return Kernels(name, **{**dict.fromkeys(MULTIPLES, multiple), **others}, source=source)


_MLAS = (
    "onnxruntime's CPU kernels (MLAS): float convolutions in a blocked layout of {} channels; padded to whole blocks, "
    "input channels in fours or no blocked layout; matrices packed in 16 columns. "
)
DEVICES: dict[str, Kernels] = {
    k.name: k
    for k in (
        # In the order of MULTIPLES.
        Kernels("avx512", 16, 4, 16, 16, 16, 4, {}, _MLAS.format(16) + "Measured: tools/bench_rounding.py."),
        Kernels("avx2", 8, 4, 8, 8, 16, 4, {"writes": 16}, _MLAS.format(8) + "SSE and AVX likewise."),
        Kernels("arm64", 8, 4, 8, 8, 8, 4, {}, "MLAS for Neon: products in tiles of 8 columns and 4 values."),
        _uniform(
            "tensorrt",
            8,
            "NVIDIA, Deep Learning Performance Guide: tensor cores want multiples of 8 with fp16 (4 with TF32) and of "
            "16 with int8; TensorRT packs channels in 8 (kHWC8) and 32 (kCHW32, int8).",
            int8=dict.fromkeys(MULTIPLES, 32),
        ),
        _uniform(
            "hexagon",
            32,
            "Qualcomm AI Engine Direct, HTP network design: activations are stored in crouton blocks of 32 channels.",
        ),
        _uniform(
            "ethos-u",
            16,
            "Arm Vela: feature maps in NHCWB16, bricks of 16 channels; 17 channels take the memory and cycles of 32.",
        ),
        _uniform(
            "ascend",
            16,
            "Huawei CANN: NC1HWC0 with C0 = 16 (32 with int8); the last block is padded.",
            int8=dict.fromkeys(MULTIPLES, 32),
        ),
        Kernels("xnnpack", 8, 4, 8, 8, 8, 4, {}, "XNNPACK: GEMM tiles of 8 columns (f32, qs8), depthwise in 8."),
        Kernels("openvino", 16, 16, 16, 16, 16, 4, {}, "oneDNN: nChw16c blocks with AVX-512 (8 with AVX2)."),
        _uniform(
            "coreml",
            16,
            "Measured by others on the Apple Neural Engine: channels are interleaved and padded; multiples of 16 fill "
            "its lanes.",
        ),
    )
}
"""The devices that come with the package; others are added by :func:`register`, a file, or another package."""

_named: Named[Kernels] = Named("device", ENTRY_POINT, DEVICES)
unregister, names, get = _named.remove, _named.names, _named.get


def register(kernels: Kernels) -> None:
    """Add a device under its name, for ``device=`` and ``--device``.

    Args:
        kernels: the multiples.

    Raises:
        ValueError: the name is taken.
    """
    _named.add(kernels.name, kernels)


_OF_PROVIDER = {
    "TensorrtExecutionProvider": "tensorrt",
    "NvTensorRTRTXExecutionProvider": "tensorrt",
    "CUDAExecutionProvider": "tensorrt",
    "QNNExecutionProvider": "hexagon",
    "CANNExecutionProvider": "ascend",
    "XnnpackExecutionProvider": "xnnpack",
    "OpenVINOExecutionProvider": "openvino",
    "CoreMLExecutionProvider": "coreml",
}


def kernels_of(device: str | Kernels | None, providers: Sequence[str] = ()) -> Kernels:
    """Return the multiples of a device.

    Args:
        device: a name, a JSON file, the multiples themselves, or None for the first of ``providers`` that has some,
            else this machine.
        providers: execution providers of onnxruntime that the model is timed on.

    Raises:
        UsageError: there is no such device.
    """
    if isinstance(device, Kernels):
        return device
    if device is not None:
        return Kernels.load(device) if device.endswith(".json") else get(device)
    known = next((_OF_PROVIDER[p] for p in providers if p in _OF_PROVIDER), None)
    return get(known) if known else this_machine()


def this_machine() -> Kernels:
    """Return the multiples of the processor that this process runs on."""
    return DEVICES[instruction_set()]


@functools.cache
def instruction_set() -> str:
    """Return ``avx512``, ``avx2`` (also for older x86 and unknown processors: the same multiples) or ``arm64``."""
    if platform.machine().lower() in ("arm64", "aarch64", "armv8l"):
        return "arm64"
    return "avx512" if _features() & {"avx512f", "avx512_skx", "x86_v4"} else "avx2"


def _features() -> set[str]:
    """Return the features of the processor, in lower case: as numpy found it, else as the system lists it."""
    for module in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        with suppress(ImportError, AttributeError):
            has = __import__(module, fromlist=["x"]).__cpu_features__
            return {name.lower() for name, there in has.items() if there}
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return {word for line in lines if line.startswith("flags") for word in line.split(":", 1)[1].split()}
    return set()
