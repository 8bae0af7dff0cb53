"""The worth of zeros on a device: patterns that its kernels make use of, and the source of that."""

from __future__ import annotations

from dataclasses import dataclass

from onnxprune.sparsification.patterns import Pattern


@dataclass(frozen=True, slots=True)
class ZeroKernels:
    """The use that a device makes of zeros.

    Attributes:
        speeds_up: patterns that make it faster: ``2:4``, ``unstructured`` (any zeros), ``4x1`` (blocks along outputs).
        where: which layers, and from how many zeros or channels on.
        note: other gains, such as a smaller file.
        source: where that is known from.
    """

    speeds_up: tuple[str, ...] = ()
    where: str = ""
    note: str = ""
    source: str = ""


_ORT = ZeroKernels(
    note="onnxruntime's CPU kernels multiply zeros like any other number",
    source="onnxruntime: MLAS has dense kernels only; sparse initializers become dense when a model is loaded",
)
DEVICES: dict[str, ZeroKernels] = {
    "avx512": _ORT,
    "avx2": _ORT,
    "arm64": _ORT,
    "tensorrt": ZeroKernels(
        ("2:4",),
        "convolutions and matrix products in fp16 and int8, with 256 channels or more, on GPUs from Ampere on, built "
        "with sparse weights enabled",
        "",
        "NVIDIA, Accelerating Inference with Sparsity Using the Ampere Architecture and TensorRT (2021)",
    ),
    "openvino": ZeroKernels(
        ("unstructured",),
        "MatMul with int8 weights on processors with AMX, from the share of zeros that "
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE sets",
        "",
        "OpenVINO, CPU properties: sparse_weights_decompression_rate",
    ),
    "xnnpack": ZeroKernels(
        ("unstructured", "2x1", "4x1"),
        "1x1 convolutions in fp32 and fp16 of a network that begins with one 3x3 convolution, from two thirds of zeros "
        "on",
        "",
        "Elsen et al., Fast Sparse ConvNets (2020); Google, Accelerating Neural Networks on Mobile and Web with Sparse "
        "Inference (2021)",
    ),
    "coreml": ZeroKernels(
        ("unstructured",),
        "layers on the Neural Engine that wait for their weights, from three quarters of zeros on or in blocks, once "
        "coremltools has stored them by a bit mask",
        "",
        "coremltools guide, Pruning: Overview, Performance",
    ),
    "ethos-u": ZeroKernels(
        note="Vela's lossless compression makes the weights smaller, which helps where they are read slowly",
        source="Arm, Vela: weight encoding",
    ),
    "hexagon": ZeroKernels(note="no kernel for zeros is documented", source="Qualcomm AI Engine Direct, HTP"),
    "ascend": ZeroKernels(
        note="2:4 takes its own toolkit and training (AMCT), and not all of its products have kernels for it",
        source="Huawei CANN, AMCT: 2:4 structured sparsity",
    ),
}


def advice(device: str, pattern: Pattern, channels: int) -> str:
    """Return the reason why a pattern brings no speed on a device, and a pattern that would; empty where it does.

    Args:
        device: its name.
        pattern: the pattern of the zeros.
        channels: the largest number of input channels of a layer that became sparse.
    """
    known = DEVICES.get(device)
    if known is None:
        return f"it is not known that kernels of {device} make use of zeros"
    if not known.speeds_up:
        return f"zeros bring no speed on {device}: {known.note}"
    if not _covers(known.speeds_up, pattern):
        return (
            f"{pattern} brings no speed on {device}, whose kernels take {' or '.join(known.speeds_up)}: {known.where}"
        )
    if device == "tensorrt" and channels < 256:
        return f"2:4 pays on tensorrt from 256 input channels on, and no layer here has more than {channels}"
    return ""


def _covers(speeds_up: tuple[str, ...], pattern: Pattern) -> bool:
    """Return whether kernels for some patterns make use of this one: 1:4 is 2:4, and any zeros are unstructured."""
    if "unstructured" in speeds_up:
        return True
    for text in speeds_up:
        other = Pattern.of(text)
        if other == pattern:
            return True
        if other.nonzero and pattern.nonzero and pattern.group == other.group and pattern.nonzero <= other.nonzero:
            return True
    return False
