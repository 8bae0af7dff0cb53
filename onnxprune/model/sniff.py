"""What a file that is no ONNX model most likely is instead, so that the message can say what to do."""

from __future__ import annotations

from typing import NamedTuple


class Format(NamedTuple):
    """A file format by name, and what to do with a file of it."""

    name: str
    hint: str


_TEXT = Format(
    "ONNX written as text",
    "Convert it first: onnx.save(onnx.load(path, format=...), 'model.onnx'); formats are textproto, json and onnxtxt.",
)
_EXPORT = "Export it to ONNX first."
_ORT = Format("onnxruntime's own ORT format", "Use the .onnx file it was made from.")

_STARTS = (
    (b"version https://git-lfs", Format("a Git LFS pointer", "Fetch the file itself: git lfs pull")),
    (b"PK\x03\x04", Format("a zip archive (a PyTorch or Keras file?)", _EXPORT)),
    (b"\x89HDF", Format("an HDF5 file (Keras?)", _EXPORT)),
    (b"\x80\x02", Format("a Python pickle (PyTorch?)", _EXPORT)),
    (b"GGUF", Format("a GGUF file", "onnxprune reads ONNX models only.")),
    (b"\x1f\x8b", Format("a gzip archive", "Unpack it first.")),
    (b"<!DOCTYPE", Format("a web page", "Download the file itself.")),
    (b"<html", Format("a web page", "Download the file itself.")),
)


def guess_format(head: bytes) -> Format | None:
    """The format that a file's first bytes belong to; None when they may be a serialized ONNX model."""
    for start, found in _STARTS:
        if head.startswith(start):
            return found
    if head[4:8] == b"TFL3":
        return Format("a TensorFlow Lite file", _EXPORT)
    if head[4:8] == b"ORTM":
        return _ORT
    if head[8:10] == b'{"':
        return Format("a safetensors file, which holds weights but no graph", _EXPORT)
    text = head.lstrip()
    if text[:1] in (b"<", b"{", b"#") or text.startswith((b"ir_version", b"graph", b"opset_import", b"producer")):
        return _TEXT if text.isascii() and not any(b < 9 for b in text[:64]) else None
    return None
