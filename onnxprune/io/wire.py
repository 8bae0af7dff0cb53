"""Parse the protobuf wire format of a model file without copying bulk weights.

Parsing a whole model copies every weight once, and protobuf never returns that memory. Walking over the length
prefixes instead yields a small model without bulk data, and the byte ranges of the data.

Source: https://protobuf.dev/programming-guides/encoding/ and the field numbers of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

from onnxprune.errors import ModelError

Buffer = bytes | mmap.mmap

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_FLOAT_DATA = 4
TENSOR_RAW_DATA = 9
TENSOR_DOUBLE_DATA = 10
# Packed float and double fields hold the same little-endian bytes as raw_data; the other typed fields are varints.
_DATA_FIELDS = frozenset({TENSOR_FLOAT_DATA, TENSOR_RAW_DATA, TENSOR_DOUBLE_DATA})


class Field(NamedTuple):
    """One field of a message: its number, wire type, the offset of its tag, and the bytes [start, end) of its value."""

    number: int
    wire: int
    at: int
    start: int
    end: int


class Span(NamedTuple):
    """The bytes [start, end) of one initializer's data, and the TensorProto field that held them."""

    field: int
    start: int
    end: int


def encode_varint(value: int) -> bytes:
    """Encode a non-negative integer as a protobuf varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def prefix(number: int, length: int) -> bytes:
    """Return tag and length that precede a length-delimited field of ``length`` bytes."""
    return encode_varint(number << 3 | _LENGTH) + encode_varint(length)


def _decode_varint(buffer: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _broken(at)


def _broken(at: int) -> ModelError:
    return ModelError(
        f"not a complete protobuf message: it breaks off or is damaged at byte {at}",
        hint="The file is truncated or is not an ONNX model; download or export it again.",
    )


def fields(buffer: Buffer, start: int, end: int) -> Iterator[Field]:
    """Yield the fields of the message in buffer[start:end], in order. Raises ModelError for bytes that are none."""
    at = start
    while at < end:
        # Nearly every number here is one byte long: those need no call.
        tag, value = buffer[at], at + 1
        if tag > 0x7F:
            tag, value = _decode_varint(buffer, at, end)
        wire = tag & 7
        if wire == _LENGTH:
            if value < end and (length := buffer[value]) < 0x80:
                value += 1
            else:
                length, value = _decode_varint(buffer, value, end)
            after = value + length
        elif wire == _VARINT:
            after = _decode_varint(buffer, value, end)[1]
        elif wire == _FIXED32:
            after = value + 4
        elif wire == _FIXED64:
            after = value + 8
        else:
            raise _broken(at)
        if after > end or tag < 8:
            raise _broken(at)
        yield Field(tag >> 3, wire, at, value, after)
        at = after


def strip(buffer: Buffer, limit: int) -> tuple[bytes, dict[int, Span]]:
    """Serialize the ModelProto without the bulk data of its main graph's initializers; return it with the data's spans.

    Args:
        buffer: a serialized ModelProto.
        limit: largest number of bytes of data that stay inline.

    Returns:
        The bytes of the smaller model, and a map from an initializer's index in the graph to its data's span.

    Raises:
        ModelError: when the bytes are not a complete protobuf message.
    """
    parts: list[bytes] = []
    spans: dict[int, Span] = {}
    count = 0
    for field in fields(buffer, 0, len(buffer)):
        if field.number == MODEL_GRAPH and field.wire == _LENGTH:
            # The field may occur more than once: protobuf merges the occurrences, so the index runs on.
            graph, count = _strip_graph(buffer, field, count, limit, spans)
            parts += (prefix(MODEL_GRAPH, len(graph)), graph)
        else:
            parts.append(buffer[field.at : field.end])
    return b"".join(parts), spans


def _strip_graph(buffer: Buffer, graph: Field, count: int, limit: int, spans: dict[int, Span]) -> tuple[bytes, int]:
    parts: list[bytes] = []
    copied_to = graph.start  # everything before it has been copied to parts
    for field in fields(buffer, graph.start, graph.end):
        if field.number != GRAPH_INITIALIZER or field.wire != _LENGTH:
            continue
        if field.end - field.start > limit:
            tensor, span = _strip_tensor(buffer, field, limit)
            if span is not None:
                spans[count] = span
                parts += (buffer[copied_to : field.at], prefix(GRAPH_INITIALIZER, len(tensor)), tensor)
                copied_to = field.end
        count += 1
    parts.append(buffer[copied_to : graph.end])
    return b"".join(parts), count


def _strip_tensor(buffer: Buffer, tensor: Field, limit: int) -> tuple[bytes, Span | None]:
    tensor_fields = list(fields(buffer, tensor.start, tensor.end))
    data = [field for field in tensor_fields if field.number in _DATA_FIELDS]
    # Data in several pieces are legal and very rare: the parser may join them.
    if len(data) != 1 or data[0].wire != _LENGTH or data[0].end - data[0].start <= limit:
        return b"", None
    header = b"".join(buffer[field.at : field.end] for field in tensor_fields if field is not data[0])
    return header, Span(data[0].number, data[0].start, data[0].end)
