"""Weights that are read on demand and released afterwards."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from onnx import SparseTensorProto, TensorProto, helper, numpy_helper

from onnxprune.errors import ModelError
from onnxprune.io.elements import DTYPES, ONNX_TYPES, PACKED_BITS, Array, as_dtype, pack, raw, stored_bytes, unpack

Step = tuple[int, Array]


class Weight(ABC):
    """A tensor of constants that knows its name, shape and type, and reads its values on demand.

    Attributes:
        name: the tensor's name in the model.
        shape: elements along each axis.
        dtype: numpy dtype of ``read()``; from ml_dtypes for bfloat16, float8 and the types under 8 bits.
        onnx_type: the TensorProto.DataType number.
    """

    __slots__ = ("dtype", "name", "onnx_type", "shape")

    def __init__(self, name: str, onnx_type: int, shape: Sequence[int]) -> None:
        """Set name, type and shape. Raises ModelError for a type or a shape that no array can have."""
        dtype = DTYPES.get(onnx_type)
        if dtype is None:
            raise ModelError(
                f"tensor {name!r} has the unknown element type {onnx_type}",
                hint="The file is damaged, or newer than the installed onnx: pip install -U onnx ml_dtypes",
            )
        self.name = name
        self.onnx_type = onnx_type
        self.dtype = dtype
        self.shape = tuple(map(int, shape))
        # A model has thousands of these, most of them scalars and short vectors.
        if self.shape and (min(self.shape) < 0 or math.prod([s or 1 for s in self.shape]) * 16 >= 2**63):
            raise ModelError(
                f"tensor {name!r} has the impossible shape {list(self.shape)}", hint="The file is damaged."
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the data in ONNX's storage form; for strings, of their UTF-8 text."""
        if self.onnx_type == TensorProto.STRING:
            return sum(len(str(text).encode()) for text in self.read().flat)
        return stored_bytes(self.onnx_type, self.shape)

    @abstractmethod
    def read(self) -> Array:
        """Return the values: read-only or fresh, valid for the moment; callers must not change them."""

    def stored(self) -> memoryview | bytes:
        """Return the values in ONNX's raw_data form: little-endian, row-major, packed. Not for strings."""
        return pack(self.read(), self.onnx_type)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.dtype}, {list(self.shape)})"

    def _require(self, present: int) -> None:
        if self.onnx_type == TensorProto.STRING:
            raise ModelError(f"tensor {self.name!r} is text, which ONNX allows only inside the model")
        num_bytes = stored_bytes(self.onnx_type, self.shape)
        if present != num_bytes:
            raise ModelError(
                f"tensor {self.name!r} of type {self.dtype} and shape {list(self.shape)} needs {num_bytes} bytes "
                f"of data, its data have {present}",
                hint="The file is damaged; download or export it again.",
            )


class BufferWeight(Weight):
    """A weight whose stored bytes are in memory already; reading it copies nothing unless the type is packed."""

    __slots__ = ("_data",)

    def __init__(self, name: str, onnx_type: int, shape: Sequence[int], data: bytes | memoryview) -> None:
        """Hold the bytes ``data``. Raises ModelError when their length does not fit type and shape."""
        super().__init__(name, onnx_type, shape)
        self._require(len(data))
        self._data = data

    def read(self) -> Array:
        """Return the values, read-only."""
        return unpack(self._data, self.onnx_type, self.shape)

    def stored(self) -> memoryview | bytes:
        """Return the bytes given."""
        return self._data


class TensorWeight(Weight):
    """A weight held by a TensorProto with inline data; the proto must stay as it is."""

    __slots__ = ("_proto",)

    def __init__(self, proto: TensorProto, name: str | None = None) -> None:
        """Hold a proto; ``name`` replaces its own. Raises ModelError when its data do not fit its type and dims."""
        super().__init__(proto.name if name is None else name, proto.data_type, proto.dims)
        self._proto = proto
        if proto.HasField("segment"):
            raise ModelError(f"tensor {self.name!r} is stored in segments, which no current tool reads or writes")
        if proto.data_location == TensorProto.EXTERNAL:
            raise ModelError(f"the data of tensor {self.name!r} are outside the model", hint="Pass a path.")
        if self.onnx_type != TensorProto.STRING and proto.HasField("raw_data"):
            self._require(len(proto.raw_data))
        else:
            self._require_typed()

    def _require_typed(self) -> None:
        field = helper.tensor_dtype_to_field(self.onnx_type)
        num_present, num_entries = len(getattr(self._proto, field)), math.prod(self.shape)
        if self.onnx_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
            num_entries *= 2
        elif PACKED_BITS.get(self.onnx_type) in (2, 4):
            num_entries = stored_bytes(self.onnx_type, self.shape)
        if num_present != num_entries:
            raise ModelError(
                f"tensor {self.name!r} of type {self.dtype} and shape {list(self.shape)} needs {num_entries} values "
                f"in {field}, it has {num_present}",
                hint="The file is damaged; download or export it again.",
            )

    def read(self) -> Array:
        """Return the values. Raises ModelError for text that is not UTF-8."""
        if self._proto.HasField("raw_data") and self.onnx_type != TensorProto.STRING:
            return unpack(self._proto.raw_data, self.onnx_type, self.shape)
        try:
            return as_dtype(numpy_helper.to_array(self._proto), self.dtype)
        except ValueError as error:
            raise ModelError(f"the data of tensor {self.name!r} cannot be read: {error}") from error


class FileWeight(Weight):
    """A weight stored in a byte range of a file; each reading opens the file and reads just that range."""

    __slots__ = ("_stamp", "length", "offset", "path")

    def __init__(
        self, name: str, onnx_type: int, shape: Sequence[int], path: Path, offset: int, length: int | None = None
    ) -> None:
        """Refer to a range of a file. Raises ModelError for a wrong ``length`` or a missing or short file."""
        super().__init__(name, onnx_type, shape)
        self.path = path
        self.offset = offset
        self.length = stored_bytes(onnx_type, self.shape) if length is None else length
        self._require(self.length)
        try:
            self._stamp = self._check(path.stat())
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> ModelError:
        return ModelError(
            f"cannot read {str(self.path)!r}, which holds tensor {self.name!r}: {error.strerror or error}; "
            f"{self.offset + self.length} bytes are needed, none can be read",
            hint="Put the data file beside the model, under the name the model gives it.",
        )

    def _check(self, status: os.stat_result) -> tuple[int, int]:
        if status.st_size < self.offset + self.length:
            raise ModelError(
                f"{str(self.path)!r} is too short for tensor {self.name!r}: {self.offset + self.length} bytes "
                f"are needed, {status.st_size} are present",
                hint="The file is truncated; download or export it again.",
            )
        return status.st_size, status.st_mtime_ns

    def stored(self) -> memoryview | bytes:
        """Read the bytes of the range. Raises ModelError when the file is missing, too short, or has changed."""
        data = np.empty(self.length, np.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                if self._check(os.fstat(file.fileno())) != self._stamp:
                    raise ModelError(
                        f"{str(self.path)!r} has changed since the model was loaded (needed for tensor {self.name!r})",
                        hint="Load the model again.",
                    )
                file.seek(self.offset)
                view, position = data.data, 0
                while position < self.length and (count := file.readinto(view[position:])):
                    position += count
        except OSError as error:
            raise self._unreadable(error) from error
        self._require(position)
        return view

    def read(self) -> Array:
        """Return the values, as a fresh array. Raises ModelError as ``stored`` does."""
        return unpack(self.stored(), self.onnx_type, self.shape)


class ArrayWeight(Weight):
    """A weight given as an array, of any dtype that ONNX has a type for; text is a dtype of its own."""

    __slots__ = ("_array",)

    def __init__(self, name: str, array: Array) -> None:
        """Hold an array. Raises ModelError when ONNX has no element type for its dtype."""
        if array.dtype.kind in "US":
            array = array.astype(object)
        dtype = array.dtype.newbyteorder("=") if array.dtype.kind in "iufc" else array.dtype
        if dtype not in ONNX_TYPES:
            raise ModelError(f"ONNX has no element type for the dtype {array.dtype} of {name!r}")
        super().__init__(name, ONNX_TYPES[dtype], array.shape)
        self._array = array.astype(dtype, copy=False).view()
        self._array.flags.writeable = False

    def read(self) -> Array:
        """Return the array, read-only."""
        return self._array


class SparseWeight(Weight):
    """A weight of which only some entries are stored; all others are 0. It is expanded at every reading.

    Args:
        proto: the stored form; must not be changed.
        name: name of the tensor.
        most: largest number of elements after expansion.
    """

    __slots__ = ("_places", "proto")

    def __init__(self, proto: SparseTensorProto, name: str, max_elements: int) -> None:
        """Hold a proto. Raises ModelError for indices outside of the shape, and for more elements than allowed."""
        values = TensorWeight(proto.values)
        super().__init__(name, values.onnx_type, proto.dims)
        self.proto = proto
        if math.prod(self.shape) > max_elements:
            raise ModelError(
                f"the sparse tensor {name!r} of shape {list(self.shape)} has {math.prod(self.shape):,} elements, "
                f"{max_elements:,} can be unfolded",
                hint="The file is damaged, or a table of it is too large.",
            )
        indices = TensorWeight(proto.indices).read().astype(np.int64)
        is_matrix = indices.ndim == 2
        places = indices.T if is_matrix else indices[None]
        limits = np.asarray(self.shape if is_matrix else [math.prod(self.shape)], np.int64)
        is_consistent = (
            len(values.shape) == 1
            and indices.ndim in (1, 2)
            and indices.shape[0] == values.shape[0]
            and len(places) == len(limits)
            and ((places >= 0) & (places < limits[:, None])).all()
        )
        if not is_consistent:
            raise ModelError(
                f"the indices of the sparse tensor {name!r} {list(indices.shape)} do not fit its {values.shape} values "
                f"and its shape {list(self.shape)}",
                hint="The file is damaged; download or export it again.",
            )
        self._places = np.ravel_multi_index(tuple(places), self.shape) if is_matrix else indices

    def read(self) -> Array:
        """Return the values with all zeros, as a fresh array."""
        values = np.zeros(math.prod(self.shape), self.dtype)
        values[self._places] = TensorWeight(self.proto.values).read()
        return values.reshape(self.shape)


def sparse_form(weight: Weight) -> SparseTensorProto | None:
    """Return ONNX's storage form of a sparse weight, or of entries of one; None for others."""
    if isinstance(weight, SparseWeight):
        return weight.proto
    base = weight
    while isinstance(base, GatheredWeight):
        base = base.base
    if not isinstance(base, SparseWeight):
        return None
    dense = weight.read().ravel()
    places = np.flatnonzero(dense)
    values = numpy_helper.from_array(dense[places], weight.name)
    return SparseTensorProto(values=values, indices=numpy_helper.from_array(places), dims=weight.shape)


class GatheredWeight(Weight):
    """Entries of another weight, in a new order; nothing is read before a reading is requested.

    Args:
        base: the weight to gather from.
        steps: pairs of an axis and an index, applied one after the other. A one-dimensional index gathers along the
            axis (size of the result: its length); an index of the weight's own rank gathers separately at every
            position of the other axes, as numpy.take_along_axis does, and has size 1 on the axes it does not depend on.
            Indices count from 0 and are not negative.
    """

    __slots__ = ("base", "steps")

    def __init__(self, base: Weight, steps: Sequence[Step]) -> None:
        """Refer to ``base``. Raises ValueError for a step that does not fit the shape it applies to."""
        shape = list(base.shape)
        for axis, index in steps:
            _check_step(base.name, shape, axis, index)
            shape[axis] = index.shape[axis] if index.ndim > 1 else index.shape[0]
        super().__init__(base.name, base.onnx_type, shape)
        self.base = base
        self.steps = tuple(steps)

    def read(self) -> Array:
        """Return the gathered values: a view of the base's where the index is a contiguous run, else fresh."""
        array = raw(self.base.read())
        for axis, index in self.steps:
            array = _take(array, axis, index) if index.ndim == 1 else _take_along(array, axis, index)
        return array.view(self.dtype)


class DerivedWeight(Weight):
    """A function of another weight, of the same type; nothing is read or computed before a reading is requested.

    Args:
        base: the other weight.
        shape: shape of the result.
        function: maps its value to a value of as many elements as ``shape``.
    """

    __slots__ = ("base", "function")

    def __init__(self, base: Weight, shape: Sequence[int], function: Callable[[Array], Array]) -> None:
        super().__init__(base.name, base.onnx_type, shape)
        self.base, self.function = base, function

    def read(self) -> Array:
        """Return the values, as a fresh array."""
        return np.ascontiguousarray(self.function(self.base.read()), self.dtype).reshape(self.shape)


def _check_step(name: str, shape: Sequence[int], axis: int, index: Array) -> None:
    if not 0 <= axis < len(shape) or index.dtype.kind not in "iu":
        raise ValueError(f"{name}: no step along axis {axis} of {shape} with an index of {index.dtype}")
    if index.ndim != 1 and (
        index.ndim != len(shape)
        or any(i not in (1, s) for a, (i, s) in enumerate(zip(index.shape, shape)) if a != axis)  # noqa: B905
    ):
        raise ValueError(f"{name}: an index of shape {index.shape} does not fit {shape} along axis {axis}")
    # As unsigned numbers negative ones are huge: one search finds both.
    plain = index.view(np.uint64) if index.dtype == np.int64 else index.astype(np.uint64)
    if index.size and np.maximum.reduce(plain, axis=None) >= shape[axis]:
        raise ValueError(f"{name}: index {index.min()}..{index.max()} leaves axis {axis} of {shape}")


def _take(array: Array, axis: int, index: Array) -> Array:
    if index.size and int(index[-1]) - int(index[0]) == index.size - 1 and bool((np.diff(index) == 1).all()):
        run = slice(int(index[0]), int(index[-1]) + 1)
        return array[(slice(None),) * axis + (run,)]
    # The index was checked before: this mode is numpy's quickest, a third faster along the last axis.
    return np.take(array, index, axis, mode="wrap")


def _take_along(array: Array, axis: int, index: Array) -> Array:
    # Axes behind the last one that matters are copied by numpy as whole blocks, which is much faster.
    last = max([axis, *(a for a, size in enumerate(index.shape) if size > 1)])
    indices: list[Array] = []
    for a in range(last + 1):
        grid = [1] * (last + 1)
        grid[a] = -1
        indices.append(index.reshape(index.shape[: last + 1]) if a == axis else np.arange(array.shape[a]).reshape(grid))
    result: Array = array[tuple(indices)]
    return result


def to_proto(weight: Weight) -> TensorProto:
    """Return the weight as a TensorProto with its data inline."""
    if weight.onnx_type == TensorProto.STRING:
        return numpy_helper.from_array(weight.read(), weight.name)
    data = weight.stored()
    return TensorProto(name=weight.name, data_type=weight.onnx_type, dims=weight.shape, raw_data=bytes(data))
