"""Write a model: one weight in memory at a time, and a file that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from onnx import ModelProto, TensorProto

from onnxprune.errors import ModelError, UsageError
from onnxprune.io import files
from onnxprune.io.skeleton import without_data, without_graph, without_initializers
from onnxprune.io.subgraphs import outline_bodies
from onnxprune.io.weights import FileWeight, Weight, sparse_form, to_proto
from onnxprune.io.wire import GRAPH_INITIALIZER, MODEL_GRAPH, TENSOR_RAW_DATA, prefix

_INLINE_TOTAL = 1900 << 20  # protobuf reads no message of 2 GiB or more
_EXTERNAL_FROM = 1024  # smaller tensors stay inline, where shape inference finds them
_PAGE, _PAGE_FROM = 4096, 1 << 20  # large tensors start on a page, so that a runtime can map them
_ALIGN = 64

_Moved = tuple[TensorProto, int, int]
"""The header of a tensor whose data lie in a file of their own, with offset and length there."""


@dataclass(slots=True)
class _Entry:
    """An initializer to write: ``header`` serialized, then, where ``weight`` is given, its data as raw_data."""

    header: TensorProto
    weight: Weight | None = None
    nbytes: int = 0


def assemble(skeleton: ModelProto, weights: Mapping[str, Weight]) -> ModelProto:
    """Build the whole model in memory, with one copy of the weights; ``skeleton`` is not changed.

    Raises:
        ModelError: an initializer has no data, neither in the skeleton nor in ``weights``.
    """
    skeleton, weights = _closed(skeleton, weights)
    model = without_graph(skeleton)
    model.graph.MergeFrom(without_initializers(skeleton.graph))
    for tensor in skeleton.graph.initializer:
        entry = _entry(tensor, weights)
        target = model.graph.initializer.add()
        target.CopyFrom(entry.header)
        if entry.weight is not None:
            target.raw_data = bytes(_data(entry.weight, entry.nbytes))
    return model


def referring(
    skeleton: ModelProto, weights: Mapping[str, Weight], folder: Path, stored: Mapping[int, FileWeight], limit: int
) -> ModelProto | None:
    """Build the model with large weights as external data in files of ``folder`` that hold them already.

    Args:
        skeleton: the model; not changed.
        weights: weights by the initializer's name.
        folder: the folder that external locations are relative to.
        stored: file ranges of weights by their identity, besides weights that are read from such files themselves.
        limit: largest size of the model itself, in bytes.

    Returns:
        the model; None where it would be larger than ``limit``.
    """
    skeleton, weights = _closed(skeleton, weights)
    model = without_graph(skeleton)
    model.graph.MergeFrom(without_initializers(skeleton.graph))
    inline_bytes = model.ByteSize()
    for tensor in skeleton.graph.initializer:
        entry = _entry(tensor, weights)
        target = model.graph.initializer.add()
        target.CopyFrom(entry.header)
        weight = entry.weight
        if weight is None:
            continue
        file = stored.get(id(weight), weight)
        if entry.nbytes >= _EXTERNAL_FROM and isinstance(file, FileWeight) and lies_in(file, folder):
            location = file.path.absolute().relative_to(folder.absolute()).as_posix()
            _place(target, location, file.offset, entry.nbytes)
            continue
        inline_bytes += entry.nbytes
        if inline_bytes > limit:
            return None
        target.raw_data = bytes(_data(weight, entry.nbytes))
    return model


def lies_in(weight: Weight, folder: Path) -> bool:
    """Return whether a weight is read from a file of a folder, from where a runtime can map it."""
    return (
        isinstance(weight, FileWeight)
        and weight.offset % _ALIGN == 0
        and weight.path.absolute().is_relative_to(folder.absolute())
    )


def save(
    skeleton: ModelProto,
    weights: Mapping[str, Weight],
    path: str | Path,
    *,
    external: bool | None = None,
    prefer_external: bool = False,
    companions: Mapping[Path, bytes] | None = None,
) -> int:
    """Write a model, its weights one by one; return the bytes of the model and its data.

    The files take their names when they are complete; until then an earlier output stays unchanged. A link is followed.

    Args:
        skeleton: the model; initializers named in ``weights`` take shape, type and data from there.
        weights: weights by the initializer's name.
        path: the model file; external data are written to ``NAME.onnx.data`` beside it, or with a digest in the name
            where that is in use: an old model and its data are whole until the new one takes its name.
        external: whether tensors of 1 KiB and more go to the data file. None: when the model is too large for one file,
            or with ``prefer_external``.
        prefer_external: whether the model came with external data.
        companions: files that describe the model, by their paths; they are replaced with it.

    Raises:
        UsageError: the files cannot be written (the folder, the disk), or ``external=False`` for too large a model.
        ModelError: a weight cannot be read, or an initializer has no data.
    """
    path = Path(path)
    skeleton, weights = _closed(skeleton, weights)
    entries = [_entry(tensor, weights) for tensor in skeleton.graph.initializer]
    total = sum(entry.nbytes or entry.header.ByteSize() for entry in entries)
    if external is None:
        external = prefer_external or total > _INLINE_TOTAL
    if not external and total > _INLINE_TOTAL:
        raise UsageError(f"{total} bytes of weights are too many for one file", hint="Write them as external data.")
    size = 0
    try:
        with files.replacing(path) as replacement:
            if external and any(entry.nbytes >= _EXTERNAL_FROM for entry in entries):
                moved_weights: list[_Moved] = []
                writer = partial(_write_referring, skeleton=skeleton, entries=entries, moved_weights=moved_weights)
                with replacement.open_data(writer) as file:
                    moved_weights += _move_out(entries, file)
                    size = file.tell()
            else:
                with replacement.open() as file:
                    _write_model(file, skeleton, entries)
            for target, content in (companions or {}).items():
                with replacement.open_companion(target) as file:
                    file.write(content)
        return size + path.stat().st_size
    except OSError as error:
        raise UsageError(
            f"cannot write {str(path)!r}: {error.strerror or error}",
            hint="Nothing was written. Choose another folder, or make room.",
        ) from error


def data_path(path: Path) -> Path:
    """Return the path of the external data of the model at ``path``."""
    return files.append_suffix(path, ".data")


def _closed(skeleton: ModelProto, weights: Mapping[str, Weight]) -> tuple[ModelProto, Mapping[str, Weight]]:
    """Return the model in its written form: bodies in their nodes, unchanged sparse weights in their own list."""
    skeleton, weights = outline_bodies(skeleton, weights)
    sparse = {name: form for name, weight in weights.items() if (form := sparse_form(weight)) is not None}
    if not sparse:
        return skeleton, weights
    model = without_graph(skeleton)
    model.graph.MergeFrom(without_initializers(skeleton.graph))
    for tensor in skeleton.graph.initializer:
        if tensor.name in sparse:
            model.graph.sparse_initializer.add().CopyFrom(sparse[tensor.name])
            model.graph.sparse_initializer[-1].values.name = tensor.name
        else:
            model.graph.initializer.add().CopyFrom(tensor)
    return model, weights


def _entry(tensor: TensorProto, weights: Mapping[str, Weight]) -> _Entry:
    weight = weights.get(tensor.name)
    if weight is None:
        has_data = any(field.name.endswith("_data") for field, _ in tensor.ListFields())
        if not has_data and all(tensor.dims):
            raise ModelError(f"the initializer {tensor.name!r} has no data to write")
        return _Entry(tensor)
    header = without_data(tensor)
    header.data_type = weight.onnx_type
    header.dims[:] = weight.shape
    if weight.onnx_type != TensorProto.STRING:
        return _Entry(header, weight, weight.nbytes)
    header.string_data.extend(to_proto(weight).string_data)
    return _Entry(header)


def _data(weight: Weight, nbytes: int) -> memoryview | bytes:
    data = weight.stored()
    if len(data) != nbytes:
        raise ModelError(f"tensor {weight.name!r} gave {len(data)} bytes of data, its shape needs {nbytes}")
    return data


def _move_out(entries: list[_Entry], file: BinaryIO) -> list[_Moved]:
    """Write the data of the larger entries to ``file``; return their headers with offset and length there."""
    end, moved_weights = 0, []
    for entry in entries:
        if entry.weight is None or entry.nbytes < _EXTERNAL_FROM:
            continue
        gap = -end % (_PAGE if entry.nbytes >= _PAGE_FROM else _ALIGN)
        file.write(bytes(gap))
        file.write(_data(entry.weight, entry.nbytes))
        moved_weights.append((entry.header, end + gap, entry.nbytes))
        end += gap + entry.nbytes
        entry.weight = None
    return moved_weights


def _write_referring(
    file: BinaryIO, location: str, *, skeleton: ModelProto, entries: list[_Entry], moved_weights: list[_Moved]
) -> None:
    """Write the model with references to its data in the file ``location``."""
    for header, offset, length in moved_weights:
        _place(header, location, offset, length)
    _write_model(file, skeleton, entries)


def _place(header: TensorProto, location: str, offset: int, length: int) -> None:
    """Record the location of a tensor's data."""
    header.data_location = TensorProto.EXTERNAL
    header.ClearField("external_data")
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        header.external_data.add(key=key, value=str(value))


def _write_model(file: BinaryIO, skeleton: ModelProto, entries: list[_Entry]) -> None:
    """Write the model in protobuf's wire format piece by piece; serializing it as a whole holds its weights twice."""
    graph_bytes = without_initializers(skeleton.graph).SerializeToString()
    heads = []
    for entry in entries:
        head = entry.header.SerializeToString()
        if entry.weight is not None:
            head += prefix(TENSOR_RAW_DATA, entry.nbytes)
        size = len(head) + (entry.nbytes if entry.weight else 0)
        heads.append(prefix(GRAPH_INITIALIZER, size) + head)
    data = sum(entry.nbytes for entry in entries if entry.weight)
    file.write(without_graph(skeleton).SerializeToString())
    file.write(prefix(MODEL_GRAPH, len(graph_bytes) + sum(map(len, heads)) + data))
    file.write(graph_bytes)
    for entry, head in zip(entries, heads, strict=True):
        file.write(head)
        if entry.weight is not None:
            file.write(_data(entry.weight, entry.nbytes))


def check_output(path: str | Path, input_path: str | Path | None, sources: Iterable[Path] = ()) -> None:
    """Check, before any work, that a model can be written to ``path`` without harm to existing files.

    Args:
        path: the model file to write; its external data would be ``NAME.onnx.data``.
        input_path: the model being read; None when it did not come from a file.
        sources: the files with the external data of the model being read.

    Raises:
        UsageError: a folder, or no ordinary file, bears that name; its folder is missing or not writable; or one of the
            files to be written is one of those being read, under any spelling.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise UsageError(f"the output {str(path)!r} is a folder", hint="Name a file in it.")
    folder = path.parent
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"the output folder {str(folder)!r} {what}", hint="Create it first, or choose another.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"the output folder {str(folder)!r} is not writable", hint="Choose another with -o.")
    read = [Path(input_path)] if input_path is not None else []
    for target in (path, data_path(path)):
        if target.exists() and not target.is_file():
            raise UsageError(
                f"the output {str(target)!r} exists and is not an ordinary file", hint="Choose another name."
            )
        for source in (*read, *sources):
            if _same_file(target, source) or (source.parent == path.parent and files.may_be_data_of(path, source.name)):
                raise UsageError(
                    f"the output {str(target)!r} is the input file {str(source)!r}, which is never changed",
                    hint="Choose another name with -o.",
                )


def _same_file(first: Path, second: Path) -> bool:
    if first.resolve() == second.resolve():
        return True
    return first.exists() and second.exists() and first.samefile(second)
