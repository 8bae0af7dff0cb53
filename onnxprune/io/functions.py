"""Inline model-local functions, after binding their attributes call by call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, inliner

from onnxprune.errors import ModelError

# Limits on what the calls of functions may add to a model.
_MOST_NODES, _MOST_BYTES, _TIMES = 1 << 18, 1 << 28, 16

Key = tuple[str, str, str]
Bindings = Mapping[str, AttributeProto]


def inline_functions(proto: ModelProto) -> ModelProto:
    """Return the model with calls of its local functions replaced by their bodies; ``proto`` is not changed.

    onnx's inliner (1.23) ignores the default values of a function's attributes, and every value that a chain of
    references (``ref_attr_name``) passes on from there: nodes of the body use the defaults of their operators, and the
    model computes something else without an error. Every call is therefore first given a function of its own, in which
    all references are replaced by values; the inliner only has to rename tensors.

    Raises:
        ModelError: a function calls itself, two have the same name, or the inliner refuses.
    """
    _check_extent(proto)
    bound = _Binding(proto).model
    try:
        result = inliner.inline_local_functions(bound)
    except Exception as error:  # onnx's own errors have no common base
        raise _function_error(str(error)) from error
    _import_domains(result, proto.functions)
    return result


def _check_extent(proto: ModelProto) -> None:
    """Refuse functions that call others twice at every level, before inlining makes the model exceed all limits."""
    functions = {_key(function): function for function in proto.functions}
    extents: dict[Key, tuple[int, int]] = {}

    def extent(nodes: Iterable[NodeProto], callers: tuple[Key, ...]) -> tuple[int, int]:
        """Return the numbers of nodes and bytes after replacing every call."""
        count = size = 0
        for node in _all_nodes(nodes):
            key = _key(node)
            count, size = count + 1, size + (0 if any(map(_graphs, node.attribute)) else node.ByteSize())
            if key in functions and key in callers:
                raise _function_error(f"the function {key[1]!r} calls itself")
            if key in functions:
                if key not in extents:
                    extents[key] = extent(functions[key].node, (*callers, key))
                count, size = count + extents[key][0], size + extents[key][1]
        return count, size

    count, size = extent(proto.graph.node, ())
    if count > _MOST_NODES or size > max(_MOST_BYTES, _TIMES * proto.ByteSize()):
        raise ModelError(
            f"its {len(proto.functions)} local functions make {count:,} nodes of {size:,} bytes where they are called, "
            f"and at most {_MOST_NODES:,} nodes are inlined",
            hint="Functions that call others several times double with every level; export the model without them.",
        )


def _function_error(why: str) -> ModelError:
    return ModelError(f"its local functions cannot be inlined: {why}", hint="Export the model again.")


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _key(node: NodeProto | FunctionProto) -> Key:
    """Return the key that a call and its function share: domain, name and overload."""
    name = node.op_type if isinstance(node, NodeProto) else node.name
    return _domain(node.domain), name, node.overload


def _graphs(attribute: AttributeProto) -> Sequence[GraphProto]:
    return [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs


class _Binding:
    """A model whose functions have no attributes: one function per set of attribute values in its calls.

    The first function of every name keeps it, so that the names of inlined tensors, which the inliner derives from it,
    do not depend on attributes.
    """

    def __init__(self, proto: ModelProto) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(proto)
        self._versions = {_domain(o.domain): o.version for o in proto.opset_import}
        self._functions: dict[Key, FunctionProto] = {}
        for function in proto.functions:
            if self._functions.setdefault(_key(function), function) is not function:
                raise _function_error(f"two functions have the name {function.name!r}")
        self._names = {key[1] for key in self._functions}
        self._bound: dict[tuple[Key, bytes], str] = {}
        self._open: set[Key] = set()
        del self.model.functions[:]
        self._bind(self.model.graph.node, {})

    def _bind(self, nodes: Iterable[NodeProto], values: Bindings) -> None:
        """Replace the references of nodes, and of the bodies in them, by values.

        Point calls at functions without attributes.
        """
        for node in nodes:
            _resolve(node, values)
            for attribute in node.attribute:
                for graph in _graphs(attribute):
                    self._bind(graph.node, values)
            key = _key(node)
            if key in self._functions:
                node.op_type = self._function(key, {a.name: a for a in node.attribute})
                del node.attribute[:]

    def _function(self, key: Key, attributes: Bindings) -> str:
        """Return the name of a function without attributes that computes what ``key`` does with these values."""
        source = self._functions[key]
        values = {a.name: a for a in source.attribute_proto}  # their default values
        values.update((name, attributes[name]) for name in (*source.attribute, *values) if name in attributes)
        text = b"".join(values[name].SerializeToString(deterministic=True) for name in sorted(values))
        known = self._bound.get((key, text))
        if known is not None:
            return known
        if key in self._open:
            raise _function_error(f"the function {source.name!r} calls itself")
        self._open.add(key)
        function = FunctionProto()
        function.CopyFrom(source)
        del function.attribute[:], function.attribute_proto[:]
        function.name = self._free(source.name, first=all(k != key for k, _ in self._bound))
        self._bind(function.node, values)
        _name_outputs(function)
        self._adopt_version(function)
        self.model.functions.append(function)
        self._open.discard(key)
        self._bound[key, text] = function.name
        return function.name

    def _free(self, name: str, *, first: bool) -> str:
        if first:
            return name
        number = 2
        while f"{name}_{number}" in self._names:
            number += 1
        self._names.add(f"{name}_{number}")
        return f"{name}_{number}"

    def _adopt_version(self, function: FunctionProto) -> None:
        """Use the model's operator sets where they define every operator of the body alike.

        Else the call is not inlined.
        """
        for opset in function.opset_import:
            model_version = self._versions.get(_domain(opset.domain), opset.version)
            nodes = (n for n in _all_nodes(function.node) if _domain(n.domain) == _domain(opset.domain))
            ops = {n.op_type for n in nodes} - self._names
            if model_version != opset.version and all(
                _same_schema(op, _domain(opset.domain), opset.version, model_version) for op in ops
            ):
                opset.version = model_version


def _resolve(node: NodeProto, values: Bindings) -> None:
    """Replace references by values; a reference without a value removes its attribute."""
    attributes = []
    for attribute in node.attribute:
        value = values.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
        if value is not None:
            resolved = AttributeProto()
            resolved.CopyFrom(value)
            resolved.name = attribute.name
            attributes.append(resolved)
    if any(attribute.ref_attr_name for attribute in node.attribute):
        del node.attribute[:]
        node.attribute.extend(attributes)


def _name_outputs(function: FunctionProto) -> None:
    """Insert an Identity for outputs that are inputs of the function: the inliner would leave them undefined."""
    names = {*function.input, *(name for n in function.node for name in (*n.input, *n.output))}
    for i, name in enumerate(function.output):
        if name in function.input:
            copy = f"{name}_out"
            while copy in names:
                copy += "_"
            names.add(copy)
            function.node.add().CopyFrom(onnx.helper.make_node("Identity", [name], [copy]))
            function.output[i] = copy


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterable[NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in _graphs(attribute):
                yield from _all_nodes(graph.node)


def _same_schema(op: str, domain: str, own_version: int, other_version: int) -> bool:
    """Return whether two versions of an operator set define an operator the same."""
    try:
        first, second = (
            onnx.defs.get_schema(op, version, domain).since_version for version in (own_version, other_version)
        )
    except onnx.defs.SchemaError:
        return False
    return bool(first == second)


def _import_domains(model: ModelProto, functions: Iterable[FunctionProto]) -> None:
    """Import the operator sets that inlined bodies need."""
    known = {_domain(o.domain) for o in model.opset_import}
    used = {_domain(node.domain) for node in _all_nodes(model.graph.node)}
    for function in functions:
        for opset in function.opset_import:
            domain = _domain(opset.domain)
            if domain in used - known:
                known.add(domain)
                model.opset_import.add().CopyFrom(opset)
