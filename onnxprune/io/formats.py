"""Guess the format of a file that is no ONNX model, so that the message can name the next step."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from onnxprune.errors import argument
from onnxprune.io.wire import Buffer


class Format(NamedTuple):
    """A file format by name, and the next step for a file of that format."""

    name: str
    hint: str


_TEXT = Format(
    "ONNX written as text",
    "Convert it first: onnx.save(onnx.load(path, format=...), 'model.onnx'); formats are textproto, json and onnxtxt.",
)
_FROM_TORCH = "Export it to ONNX first: torch.onnx.export(model, args, 'model.onnx')."
_FROM_TF = "Convert it to ONNX first: python -m tf2onnx.convert {} --output model.onnx."
_FROM_KERAS = "Export it to ONNX first: model.export('model.onnx', format='onnx') in Keras 3."
_FROM_LITE = _FROM_TF.format("--tflite model.tflite")
_EXPORT = "Export the model that it was made from to ONNX."
_FETCH = "Download the file itself."

_ORT = Format("onnxruntime's own ORT format", "Use the .onnx file it was made from.")
_LITE = Format("a TensorFlow Lite file", _FROM_LITE)
_PICKLE = Format("a Python pickle (a PyTorch checkpoint?)", _FROM_TORCH)
_TORCH = Format("a PyTorch file", _FROM_TORCH)
_GRAPH_DEF = Format(
    "a TensorFlow graph",
    _FROM_TF.format("--graphdef model.pb --inputs x:0 --outputs y:0")[:-1]
    + "; of a SavedModel give --saved-model FOLDER.",
)
_HDF5 = Format("an HDF5 file (a Keras model?)", _FROM_KERAS)
_KERAS = Format("a Keras file", _FROM_KERAS)
_COREML = Format("a Core ML model", _EXPORT)
_OPENVINO = Format("an OpenVINO model", _EXPORT)
_ENGINE = Format("a TensorRT engine", _EXPORT)
_PADDLE = Format("a PaddlePaddle model", "Convert it to ONNX first, with paddle2onnx.")
_CAFFE = Format("a Caffe model", _EXPORT)
_NCNN = Format("an ncnn model", _EXPORT)
_GGUF = Format("a GGUF file", "onnxprune reads ONNX models only.")
_SAFETENSORS = Format("a safetensors file, which holds weights but no graph", "Export the model to ONNX.")
_DATA = Format("numpy data", f"Give a model here; inputs go to {argument('data')}.")
_PAGE = Format("a web page", _FETCH)
_IMAGE = Format("an image", f"Give a model here; a folder of images goes to {argument('data')}.")

_STARTS = (
    (b"version https://git-lfs", Format("a Git LFS pointer", "Fetch the file itself: git lfs pull")),
    (b"\x89HDF", _HDF5),
    (b"GGUF", _GGUF),
    (b"\x1f\x8b", Format("a gzip archive", "Unpack it first.")),
    (b"BZh", Format("a bzip2 archive", "Unpack it first.")),
    (b"\xfd7zXZ", Format("an xz archive", "Unpack it first.")),
    (b"7z\xbc\xaf", Format("a 7z archive", "Unpack it first.")),
    (b"\x28\xb5\x2f\xfd", Format("a zstd archive", "Unpack it first.")),
    (b"\x93NUMPY", _DATA),
    (b"ftrt", _ENGINE),
    (b"ptrt", _ENGINE),
    (b"7767517", _NCNN),
    (b"RKNN", Format("an RKNN model", _EXPORT)),
    (b"\x89PNG", _IMAGE),
    (b"\xff\xd8\xff", _IMAGE),
    (b"%PDF", Format("a PDF document", _FETCH)),
    (b"\x7fELF", Format("a program", _FETCH)),
    (b"MZ\x90", Format("a program", _FETCH)),
)
_SUFFIXES = {
    ".tflite": _LITE,
    ".lite": _LITE,
    ".pb": _GRAPH_DEF,
    ".pbtxt": _GRAPH_DEF,
    ".pt": _TORCH,
    ".pth": _TORCH,
    ".pt2": _TORCH,
    ".ckpt": _TORCH,
    ".torchscript": _TORCH,
    ".pkl": _PICKLE,
    ".h5": _HDF5,
    ".hdf5": _HDF5,
    ".keras": _KERAS,
    ".mlmodel": _COREML,
    ".mlpackage": _COREML,
    ".xml": _OPENVINO,
    ".engine": _ENGINE,
    ".trt": _ENGINE,
    ".plan": _ENGINE,
    ".pdmodel": _PADDLE,
    ".caffemodel": _CAFFE,
    ".prototxt": _CAFFE,
    ".param": _NCNN,
    ".gguf": _GGUF,
    ".ggml": _GGUF,
    ".safetensors": _SAFETENSORS,
    ".npz": _DATA,
    ".npy": _DATA,
    ".ort": _ORT,
    ".html": _PAGE,
}


def guess_format(data: Buffer) -> Format | None:
    """Return the format of a file by its bytes; None when they may be a serialized ONNX model."""
    head = bytes(data[:4096])
    for start, known in _STARTS:
        if head.startswith(start):
            return known
    if head.startswith(b"PK\x03\x04"):
        return _archive(data)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    if head[4:8] == b"TFL3":
        return _LITE
    if head[4:8] == b"ORTM":
        return _ORT
    if head[8:10] == b'{"':
        return _SAFETENSORS
    text = head.lstrip()
    if text[:9].lower() == b"<!doctype" or text[:5].lower() == b"<html":
        return _PAGE
    if text[:5] == b"<?xml" or text.startswith(b"<net "):
        return _OPENVINO
    if text[:1] in (b"<", b"{", b"#") or text.startswith((b"ir_version", b"graph", b"opset_import", b"producer")):
        return _TEXT if text.isascii() and not any(b < 9 for b in text[:64]) else None
    return None


def guess_by_name(path: Path | None) -> Format | None:
    """Return the format that a file's name suggests, for a file that is no ONNX model; None where it suggests none."""
    return _SUFFIXES.get(path.suffix.lower()) if path is not None else None


def guess_folder(folder: Path) -> Format | None:
    """Return the format of a folder; None where it may be any folder."""
    if (folder / "saved_model.pb").is_file():
        return Format("a TensorFlow SavedModel", _FROM_TF.format("--saved-model FOLDER"))
    if folder.suffix.lower() == ".mlpackage":
        return _COREML
    return None


def _archive(data: Buffer) -> Format:
    """Return the format of a zip archive by its members."""
    try:
        file: Any = io.BytesIO(data) if isinstance(data, bytes) else data
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        names = []
    model_name = next((name for name in names if name.endswith(".onnx")), None)
    if model_name is not None:
        return Format("a zip archive", f"Unpack it first: it holds {model_name!r}.")
    if any(name.endswith(("data.pkl", "constants.pkl")) for name in names):
        return _TORCH
    if any(name.endswith(("model.weights.h5", "config.json")) for name in names):
        return _KERAS
    if names and all(name.endswith(".npy") for name in names):
        return _DATA
    return Format("a zip archive (a PyTorch or Keras file?)", _EXPORT)
