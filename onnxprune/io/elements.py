"""ONNX element types: their numpy dtype, and the bytes in which ONNX stores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto, numpy_helper

Array = npt.NDArray[Any]

_NUMPY = {
    "FLOAT": np.float32,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "UINT16": np.uint16,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "STRING": np.object_,
    "BOOL": np.bool_,
    "FLOAT16": np.float16,
    "DOUBLE": np.float64,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "COMPLEX64": np.complex64,
    "COMPLEX128": np.complex128,
}
_ML_DTYPES = {
    "BFLOAT16": "bfloat16",
    "FLOAT8E4M3FN": "float8_e4m3fn",
    "FLOAT8E4M3FNUZ": "float8_e4m3fnuz",
    "FLOAT8E5M2": "float8_e5m2",
    "FLOAT8E5M2FNUZ": "float8_e5m2fnuz",
    "FLOAT8E8M0": "float8_e8m0fnu",
    "UINT4": "uint4",
    "INT4": "int4",
    "FLOAT4E2M1": "float4_e2m1fn",
    "UINT2": "uint2",
    "INT2": "int2",
    "FLOAT6E2M3": "float6_e2m3fn",
    "FLOAT6E3M2": "float6_e3m2fn",
}
_NAMED_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}


def _dtypes() -> dict[int, np.dtype[Any]]:
    # Both tables name every type of the ONNX standard; an older onnx or ml_dtypes knows only some of them.
    known: dict[int, np.dtype[Any]] = {}
    for name, number in TensorProto.DataType.items():
        kind = _NUMPY.get(name) or getattr(ml_dtypes, _ML_DTYPES.get(name, ""), None)
        if kind is not None:
            known[number] = np.dtype(kind)
    return known


DTYPES = _dtypes()
ONNX_TYPES = {dtype: number for number, dtype in DTYPES.items()}
PACKED_BITS = {number: _NAMED_BITS[name] for name, number in TensorProto.DataType.items() if name in _NAMED_BITS}


def stored_bytes(onnx_type: int, shape: Sequence[int]) -> int:
    """Return the number of bytes of a tensor of a fixed-size type in ONNX; types under 8 bits are packed."""
    bits = PACKED_BITS.get(onnx_type)
    if bits is None:
        return math.prod(shape) * DTYPES[onnx_type].itemsize
    return (math.prod(shape) * bits + 7) // 8


def as_dtype(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return the array with the given dtype, itself when it has it."""
    return array if array.dtype == dtype else array.astype(dtype)


def align_array(array: Array) -> Array:
    """Return an array that can be read quickly: itself, or an aligned copy.

    Data may start anywhere in a file; arithmetic at unaligned addresses is up to ten times slower than at aligned ones.
    """
    return array if array.flags.aligned else array.copy()


def raw(array: Array) -> Array:
    """Return a view of elements as plain bytes, for moving them: at unaligned addresses that avoids a copy."""
    return array if array.flags.aligned else array.view(f"V{array.itemsize}")


def unpack(data: bytes | memoryview, onnx_type: int, shape: Sequence[int]) -> Array:
    """Decode ONNX's storage form into an array; it shares the memory of ``data`` unless the type is packed."""
    dtype = DTYPES[onnx_type]
    if onnx_type in PACKED_BITS:
        proto = TensorProto(data_type=onnx_type, dims=shape, raw_data=bytes(data))
        return as_dtype(numpy_helper.to_array(proto), dtype)
    return np.frombuffer(data, dtype).reshape(shape)


def pack(array: Array, onnx_type: int) -> memoryview | bytes:
    """Encode an array of numbers in ONNX's storage form; the bytes share the memory of ``array`` where possible."""
    if onnx_type in PACKED_BITS:
        return numpy_helper.from_array(array).raw_data
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
