"""Operators that onnx defines by others, written out: their gradient follows from those of their parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TypeProto

Types = Mapping[str, TypeProto]


def expand(node: NodeProto, opset: int, types: Types) -> list[NodeProto] | None:
    """Return the nodes that define an operator of ONNX's own domain; None where it has no such definition.

    Args:
        node: the node.
        opset: the opset of the model.
        types: types of its inputs, with shapes where known.
    """
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, opset, ""):
        return None
    schema: Any = onnx.defs.get_schema(node.op_type, opset, "")  # its stubs lack the bodies
    body = _body(schema, node, types)
    return None if body is None else _inlined(node, schema, body)


def _body(schema: Any, node: NodeProto, types: Types) -> FunctionProto | None:
    if schema.has_function:
        body: FunctionProto = schema.function_body
        return body
    if schema.has_context_dependent_function:
        kinds = [types.get(name, TypeProto()).SerializeToString() for name in node.input]
        version = max(schema.context_dependent_function_opset_versions, default=schema.since_version)
        text = schema.get_context_dependent_function_with_opset_version(version, node.SerializeToString(), kinds)
        return FunctionProto.FromString(bytes(text)) if text else None
    return None


def _inlined(node: NodeProto, schema: Any, body: FunctionProto) -> list[NodeProto] | None:
    """Return copies of a body's nodes with the names and attributes of a call."""
    attributes = {a.name: a for a in node.attribute}
    for name, attribute in schema.attributes.items():
        default = attribute.default_value
        if name not in attributes and default is not None and default.type != AttributeProto.UNDEFINED:
            attributes[name] = default
    names = dict(zip(body.input, [*node.input, *[""] * len(body.input)], strict=False))
    names |= {inner: outer for inner, outer in zip(body.output, node.output, strict=False) if outer}
    stem = node.name or next(o for o in node.output if o)
    result = []
    for k, inner in enumerate(body.node):
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in inner.attribute):
            return None
        copy = NodeProto(op_type=inner.op_type, domain=inner.domain, name=f"{stem}/{inner.op_type}.{k}")
        copy.input.extend(names.get(name, f"{stem}/{name}") if name else "" for name in inner.input)
        copy.output.extend(names.get(name, f"{stem}/{name}") if name else "" for name in inner.output)
        for attribute in inner.attribute:
            if not attribute.ref_attr_name:
                copy.attribute.add().CopyFrom(attribute)
            elif attribute.ref_attr_name in attributes:
                target = copy.attribute.add()
                target.CopyFrom(attributes[attribute.ref_attr_name])
                target.name = attribute.name
        result.append(copy)
    return result
