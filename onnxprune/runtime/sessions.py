"""Sessions of onnxruntime: opening, inputs, running, with every failure turned into a typed error."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from onnxprune.errors import ModelError, UsageError, argument
from onnxprune.graph.probes import InputSpec
from onnxprune.graph.resized import Resized, fitted, read
from onnxprune.io.files import is_working_file, workspace
from onnxprune.io.weights import Weight


def eps(dtype: np.dtype[Any]) -> float:
    """Machine epsilon of a float or complex type; 0 for anything else, so that it also tells floats from the rest."""
    return _limits(dtype)[0]


def measures(dtype: np.dtype[Any]) -> bool:
    """Return whether numbers of this type have sizes to compare: floats, and codes of 8 bits, as quantised models give.

    Longer integers are mostly labels, indices and counts.
    """
    return eps(dtype) > 0 or (dtype.kind in "iu" and dtype.itemsize == 1)


def largest(dtype: np.dtype[Any]) -> float:
    """Return the largest finite value of a float or complex type; 0 for anything else."""
    return _limits(dtype)[1]


def _limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    try:
        info = cast(Any, ml_dtypes.finfo)(dtype)
    except (ValueError, TypeError, KeyError):
        return 0.0, 0.0
    return float(info.eps), float(info.max)


P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def cores() -> Iterator[ThreadPoolExecutor]:
    """Start a thread per core, with one BLAS thread in each of them; sessions opened there are as those opened here."""
    known, held_once = _libraries.get(), _frugal.get()

    def start() -> None:
        _libraries.set(known)
        _frugal.set(held_once)

    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(os.cpu_count() or 1, "", start) as pool:
        yield pool


def spread(work: Callable[[T], R], items: Sequence[T], *, heavy: bool = False) -> list[R]:
    """Apply ``work`` to every item on a pool of threads; the results are in the order of the items.

    Args:
        work: function of an item.
        items: items to process.
        heavy: whether a single item has products large enough to be shared between BLAS threads. Small ones take longer
            that way, and many times longer where other programs use the cores too.
    """
    if len(items) < 2 and heavy:
        return [work(item) for item in items]
    with cores() as pool:
        return list(pool.map(work, items))


Array = NDArray[Any]
Feed = dict[str, Array]
"""One call of a model: input name -> array."""

Progress = Callable[[str, float], None]
"""Called with the stage's name and the share done, 0..1."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "string": np.dtype(object),
    **{n: np.dtype(n) for n in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}

# onnxruntime's numpy interface refuses these; they travel as raw bytes: (carrier, element type number of ONNX).
_CARRIERS: dict[str, tuple[Any, int]] = {
    "bfloat16": (np.uint16, 16),
    "float8e4m3fn": (np.uint8, 17),
    "float8e4m3fnuz": (np.uint8, 18),
    "float8e5m2": (np.uint8, 19),
    "float8e5m2fnuz": (np.uint8, 20),
}
_PACKED = ("int4", "uint4")

_NO_KERNEL = (
    re.compile(r"Could not find an implementation for (?P<op>[\w.:]+)\((?P<version>-?\d+)\)"),
    re.compile(r"Failed to find kernel for (?P<op>[\w.:]+)\((?P<version>-?\d+)\)"),
    re.compile(r"(?P<op>[\w.]+:[\w.]+)\((?P<version>-?\d+)\) is not a registered function/op"),
    re.compile(r"No Op registered for (?P<op>[\w.:]+) with domain_version of (?P<version>-?\d+)"),
)
_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_SOURCE_PLACE = re.compile(r"/onnxruntime_src/\S+:\d+ .*? was false\. ?")
_CUT_ANYWAY = f"Use {argument('validate', False)} to cut it all the same, with a structural check in place of a run."


def digest_of(feed: Feed) -> bytes:
    """Return a digest of inputs by name, type, shape and value."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(feed.items()):
        array = np.asarray(value)
        digest.update(f"{name}:{array.dtype}:{array.shape}".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return digest.digest()


_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
CANNOT_RUN = "onnxruntime cannot run the model"
"""Begins the message of every run that failed."""

HEAVY = 256 << 20
"""Bytes of weights from which on runs hold them once, mapped from a file."""


def is_heavy(weights: Mapping[str, Weight]) -> bool:
    """Return whether memory has room for one copy of the weights only."""
    return sum(weight.nbytes for weight in weights.values()) > HEAVY


_frugal = ContextVar("frugal", default=False)


@contextmanager
def frugal(enabled: bool = True) -> Iterator[None]:
    """Sessions opened meanwhile hold weights once: kernels may not keep copies in an order of their own, and what is
    computed from weights alone (masks, types, codes) is computed when it is needed.

    They are slower by that, and never timed. A model of 4 GB takes 6.4 GB otherwise, with masks on its weights 8.6 GB.
    """
    token = _frugal.set(enabled)
    try:
        yield
    finally:
        _frugal.reset(token)


_libraries: ContextVar[tuple[str, ...]] = ContextVar("libraries", default=())


def libraries() -> tuple[str, ...]:
    """Return the libraries of custom operators that sessions know at present."""
    return _libraries.get()


@contextmanager
def custom_ops(files: Iterable[str | Path]) -> Iterator[None]:
    """Sessions opened meanwhile know the operators of these libraries, besides those that they knew before.

    Args:
        files: shared libraries that export ``RegisterCustomOps``.

    Raises:
        UsageError: one is missing, or onnxruntime cannot load it.
    """
    paths = [str(_library(Path(file))) for file in files]
    token = _libraries.set(tuple(dict.fromkeys([*_libraries.get(), *paths])))
    try:
        yield
    finally:
        _libraries.reset(token)


def with_custom_ops(function: Callable[P, R]) -> Callable[P, R]:
    """Make a call register the libraries of its argument ``custom_op_libraries`` in its sessions, as a decorator."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        libraries = cast("Iterable[str | Path]", kwargs.get("custom_op_libraries") or ())
        with custom_ops(libraries):
            return function(*args, **kwargs)

    return call


def _library(path: Path) -> Path:
    """Return the whole path of a library that loads; raises UsageError."""
    if not path.is_file():
        raise UsageError(
            f"{argument('custom_op_libraries')} {str(path)!r} is {'a folder' if path.is_dir() else 'not there'}",
            hint="Give the shared library that registers the operators: a file .so, .dll or .dylib.",
        )
    try:
        ort.SessionOptions().register_custom_ops_library(str(path.resolve()))
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        raise UsageError(
            f"{argument('custom_op_libraries')} {str(path)!r} cannot be loaded: {shorten(str(error))}",
            hint="It has to be built for this system and this onnxruntime, and to export RegisterCustomOps.",
        ) from error
    return path.resolve()


class Referring(NamedTuple):
    """A serialised model whose external data lie in files of a folder."""

    model: bytes
    folder: Path


Openable = Path | bytes | Referring
"""Sources of a session."""


@cache
def refers() -> bool:
    """Return whether this onnxruntime takes external data of models that are no files from a folder of one's choice."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    info = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "probe", [], [info], [tensor])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=7)
    with workspace() as folder:
        (folder / "w.data").write_bytes(bytes(4))
        try:
            open_session(Referring(model.SerializeToString(), folder), optimize=False)
        except ModelError:
            return False
    return True


def open_session(
    model: Openable,
    *,
    optimize: bool = True,
    threads: int | None = None,
    spin: bool = False,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    profile: str = "",
) -> ort.InferenceSession:
    """Open a model in onnxruntime.

    Args:
        model: a path (external data is found beside it), the serialised model, or one that refers to a folder.
        optimize: False turns every graph optimisation off; fusions change rounding, so exactness runs go without. A
            model that only loads without them is opened without them.
        threads: threads inside an operator; None leaves the choice to onnxruntime.
        spin: threads that wait for work within a run keep their core busy, as onnxruntime's own settings have it.
            Measured times need it: it takes three times the processor time, and a run takes many times as long where
            other programs want the cores. Between runs no thread spins, unlike there: it would slow down other models
            that are measured in turn.
        providers: in order of preference.
        profile: path of a file for the times of all nodes; None: they are not written.

    Raises:
        ModelError: the file does not load, or holds an operator that onnxruntime has no kernel for (named).
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for library in _libraries.get():
        options.register_custom_ops_library(library)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if _frugal.get():
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
        # In the graph's order, not all that needs no input ahead of everything else.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        if optimize:  # other layouts are copies
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    try:
        source: str | bytes = str(model) if isinstance(model, Path) else b""
        if isinstance(model, bytes):
            source = model
        elif isinstance(model, Referring):
            source = model.model
            options.add_session_config_entry(_DATA_FOLDER, str(model.folder))
        session = ort.InferenceSession(source, options, providers=list(providers))
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base of their own
        if optimize:
            # Some graphs break onnxruntime's own fusions (fully quantised convolutions) and run well without.
            with suppress(ModelError):
                return open_session(
                    model, optimize=False, threads=threads, spin=spin, providers=providers, profile=profile
                )
        is_users = isinstance(model, Path) and not is_working_file(model)
        raise _load_error(str(error), str(model) if is_users else "the model") from error
    # onnxruntime goes on without a provider whose libraries do not load, and times would be those of another device.
    missing_provider = next((name for name in providers if name not in session.get_providers()), None)
    if missing_provider is not None:
        raise UsageError(
            f"onnxruntime cannot start the provider {missing_provider}",
            hint="The libraries that it needs (CUDA and cuDNN, say) are missing, or of another version.",
        )
    return session


def _load_error(message: str, model: str) -> ModelError:
    """Return the typed error for onnxruntime's load message."""
    for pattern in _NO_KERNEL:
        if match := pattern.search(message):
            version = "" if match["version"].startswith("-") else f" version {match['version']}"
            return ModelError(
                f"onnxruntime has no kernel for operator {match['op']!r}{version}, so {model} cannot be run here: "
                f"{shorten(message)}",
                hint=f"{_CUT_ANYWAY} A library that has the operator goes to {argument('custom_op_libraries')}.",
            )
    return ModelError(f"onnxruntime cannot load {model}: {shorten(message)}", hint=_CUT_ANYWAY)


def shorten(message: str, limit: int = 300) -> str:
    """Return the first line of an onnxruntime message, shortened, without status prefix and source places."""
    lines = [line for line in _PREFIX.sub("", message.strip()).splitlines() if line.strip()]
    line = _SOURCE_PLACE.sub("", lines[0]).strip() if lines else "no message"
    return line if len(line) <= limit else line[: limit - 3] + "..."


def input_specs(session: ort.InferenceSession) -> list[InputSpec]:
    """Return the inputs that a call must give, in order; initializers listed as inputs are left out.

    Raises:
        ModelError: an input is a sequence, a map, or of an element type that numpy cannot hold.
    """
    specs = []
    for value in session.get_inputs():
        element = _element(value.type)
        if element not in _DTYPES:
            raise ModelError(
                f"input {value.name!r} has type {value.type}; only tensors of {', '.join(_DTYPES)} can be fed",
                hint=_CUT_ANYWAY,
            )
        specs.append(InputSpec(value.name, _DTYPES[element], tuple(value.shape)))
    return specs


def _element(kind: str) -> str:
    """Return the element type inside ``tensor(...)`` or ``optional(tensor(...))``; empty for sequences and maps."""
    match = re.fullmatch(r"(?:optional\()?tensor\((\w+)\)+", kind)
    return match[1] if match else ""


def run(session: ort.InferenceSession, feeds: Mapping[str, Array]) -> Feed:
    """Run a model once and return its outputs by name.

    The i-th element of a list (a sequence output) is returned as ``name#i``, a map as the array of its values in the
    order of its keys; absent optional outputs are left out, and so are sequences of models with narrow float types.
    int4 comes back in int8, other element types in their own.

    Raises:
        ModelError: the run failed (onnxruntime's message, shortened), or a value cannot be exchanged with onnxruntime.
    """
    try:
        values = prepare(session, feeds)()
    except (MemoryError, ModelError):
        raise
    except Exception as error:
        raise ModelError(f"{CANNOT_RUN}: {shorten(str(error))}") from error
    results: Feed = {}
    for name, value in zip(_interface(session).outputs, values, strict=True):
        _flatten(name, value, results)
    # onnxruntime 1.22 returns an input that is an output, too, in the caller's memory, without a hold on it.
    for name, array in results.items():
        if any(np.may_share_memory(array, array_in) for array_in in feeds.values() if isinstance(array_in, np.ndarray)):
            results[name] = array.copy()
    return results


def runs(model: Openable, feed: Mapping[str, Array]) -> bool:
    """Return whether a model runs on this feed."""
    try:
        run(open_session(model), feed)
    except ModelError:
        return False
    return True


def prepare(session: ort.InferenceSession, feeds: Mapping[str, Array]) -> Callable[[], list[Any]]:
    """Return a call that only runs the model on ``feeds``: conversions are done here, once.

    Values for inputs that the model lacks are left out: caches go with the layers that they belong to. Of values at the
    sizes of the original, a model whose inputs lost channels gets those that remain.

    Raises:
        ModelError: an input's element type cannot be handed to onnxruntime.
    """
    options = ort.RunOptions()
    options.log_severity_level = 4  # a failed run raises; the log line would only repeat it on stderr
    interface = _interface(session)
    feeds = {name: array for name, array in feeds.items() if name in interface.inputs}
    if interface.resized:
        feeds = fitted(interface.resized, feeds)
    if not interface.is_narrow:
        arrays = {name: np.asarray(array) for name, array in feeds.items()}
        return lambda: list(session.run(None, arrays, options))
    inputs = interface.inputs
    values = {name: _ort_value(name, np.asarray(array), inputs.get(name, "")) for name, array in feeds.items()}
    return lambda: list(session.run_with_ort_values(None, values, options))


def at_sizes_of(session: ort.InferenceSession, outputs: Feed) -> Feed:
    """Return outputs of an original at the sizes of a model whose outputs lost channels."""
    resized = _interface(session).resized
    return fitted(resized, outputs) if resized else outputs


class _Interface(NamedTuple):
    """Inputs and outputs of a session.

    Attributes:
        inputs: types by input.
        outputs: outputs in order.
        is_narrow: whether numpy lacks one of the types.
        resized: channels that inputs and outputs lost.
    """

    inputs: Mapping[str, str]
    outputs: Sequence[str]
    is_narrow: bool
    resized: Resized


_interfaces: WeakKeyDictionary[ort.InferenceSession, _Interface] = WeakKeyDictionary()


def _interface(session: ort.InferenceSession) -> _Interface:
    """Return the inputs and outputs of a session, read once: pieces of models are run thousands of times."""
    known = _interfaces.get(session)
    if known is None:
        inputs, outputs = ({i.name: i.type for i in infos} for infos in (session.get_inputs(), session.get_outputs()))
        types = {_element(kind) for kind in (*inputs.values(), *outputs.values())}
        resized = read(session.get_modelmeta().custom_metadata_map)
        known = _Interface(inputs, list(outputs), bool(types & {*_CARRIERS, *_PACKED}), resized)
        _interfaces[session] = known
    return known


def _ort_value(name: str, array: Array, kind: str) -> Any:
    """Convert an array to an onnxruntime value, from raw bytes for element types that its numpy interface refuses."""
    element = _element(kind)
    array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar rank 1
    if element in _CARRIERS:
        carrier, number = _CARRIERS[element]
        if array.dtype != _DTYPES[element]:
            raise ModelError(f"input {name!r} has element type {array.dtype}, the model wants {element}")
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(carrier), number)
    try:
        return ort.OrtValue.ortvalue_from_numpy(array)
    except RuntimeError as error:
        raise ModelError(
            f"input {name!r} ({kind}) cannot be fed to a model with narrow types: {shorten(str(error))}",
            hint=_CUT_ANYWAY,
        ) from error


def _flatten(name: str, value: Any, into: Feed) -> None:
    """Put an output value into ``into`` as arrays: lists item by item, maps as their values, absent ones not at all."""
    if isinstance(value, ort.OrtValue):
        if value.has_value() and value.is_tensor():
            into[name] = _tensor(value)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _flatten(f"{name}#{index}", item, into)
    elif isinstance(value, dict):
        into[name] = np.asarray([value[key] for key in sorted(value)])
    elif isinstance(value, (np.ndarray, np.generic)):
        into[name] = np.asarray(value)


def _tensor(value: Any) -> Array:
    """Convert an onnxruntime tensor to an array, from raw bytes where its numpy interface refuses the element type."""
    element, shape = _element(value.data_type()), tuple(value.shape())
    if element not in _CARRIERS and element not in _PACKED:
        return np.asarray(value.numpy())
    count = int(np.prod(shape, dtype=np.int64))
    size = (count + 1) // 2 if element in _PACKED else count * np.dtype(_CARRIERS[element][0]).itemsize
    raw = np.frombuffer(ctypes.string_at(value.data_ptr(), size) if size else b"", np.uint8)
    if element in _CARRIERS:
        return raw.view(_DTYPES[element]).reshape(shape)
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1).ravel()[:count].astype(np.int8)
    return (nibbles if element == "uint4" else (nibbles ^ 8) - 8).reshape(shape)
