"""How much of a transformer can go, and goes at ratio 0.3, by export and by the form of its weights.

python tools/bench_transformers.py FOLDER                        every *.onnx there, in every form
python tools/bench_transformers.py FOLDER --models 'genai*' --forms own,nbits --cache-heads
python tools/bench_transformers.py --memory 1.5GB                a decoder of random weights, pruned, proved, repaired

Forms are made with onnxruntime's own quantizers. Shares are of the elements of all constants (a byte of packed codes is
one element). The table is Markdown; weights are random, so it says nothing about accuracy.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import onnxprune as op
from onnxprune.channels.analysis import Analysis
from onnxprune.graph.facts import integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.runtime.inputs import synthetic

AIM, BLOCK = 0.28, 32
"""Share that should go at ratio 0.3, and the block of 4-bit codes."""
CODES = (
    "DequantizeLinear",
    "MatMulInteger",
    "ConvInteger",
    "MatMulNBits",
    "QMoE",
    "GatherBlockQuantized",
    "QLinearMatMul",
)


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Seeded inputs at the sizes of an analysis."""

    def __init__(self, path: Path) -> None:
        analysis = Analysis(str(path))
        bounds, specs = integer_bounds(analysis.graph, analysis.facts), input_specs(analysis.graph)
        self._feeds = iter([synthetic(specs, p.inputs, bounds=bounds, seed=1) for p in analysis.facts.probes[:1]])

    def get_next(self) -> dict[str, Any] | None:
        """Return the next call."""
        return next(self._feeds, None)


def dynamic(source: Path, target: Path) -> None:
    """Write the model with products in dynamic int8."""
    options = {"DefaultTensorType": TensorProto.FLOAT}  # of what other domains' operators give
    quantization.quantize_dynamic(source, target, weight_type=quantization.QuantType.QInt8, extra_options=options)


def qdq(source: Path, target: Path) -> None:
    """Write the model with quantised weights and activations."""
    options = {"quant_format": quantization.QuantFormat.QDQ, "per_channel": True}
    quantization.quantize_static(source, target, _Reader(source), **options)


def nbits(source: Path, target: Path) -> None:
    """Write the model with 4-bit products."""
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=BLOCK, is_symmetric=False)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


FORMS: dict[str, Callable[[Path, Path], None]] = {"dynamic int8": dynamic, "QDQ": qdq, "MatMulNBits": nbits}


class Line(NamedTuple):
    """One model in one form: shares that can go and do go, and what the proof found, or why there is none."""

    model: str
    form: str
    parameters: int = 0
    possible: float = 0.0
    removed: float = 0.0
    exact: str = ""
    seconds: float = 0.0
    note: str = ""


def measure(name: str, form: str, path: Path, settings: dict[str, Any]) -> Line:
    """Prune one model twice: everything that can go, and ratio 0.3 with its proof."""
    try:
        most = op.prune(str(path), ratio=0.99, latency=False, **{**settings, "validate": False}).report.totals
        start = time.perf_counter()
        result = op.prune(str(path), ratio=0.3, latency=False, **settings)
    except op.OnnxpruneError as error:
        return Line(name, form, note=str(error).splitlines()[0][:150])
    totals, exactness = result.report.totals, result.report.exactness
    possible, removed = (1 - t.params_after / max(t.params_before, 1) for t in (most, totals))
    shown = "yes" if exactness.passed else "not proved" if exactness.passed is None else "no"
    seconds = time.perf_counter() - start
    note = "" if removed >= AIM else barrier(result)
    return Line(name, form, totals.params_before, possible, removed, shown, seconds, note)


def barrier(result: op.Result) -> str:
    """Return the barrier that holds most channels."""
    barriers = sorted(result.report.barriers, key=lambda b: -b.channels)
    return f"{barriers[0].op}: {barriers[0].detail} ({barriers[0].channels})" if barriers else "small groups"


def lines(folder: Path, models: str, forms: list[str], settings: dict[str, Any]) -> Iterator[Line]:
    """Measure every model in its own form, and float ones in every form that can be made of them."""
    for path in sorted(folder.glob("*.onnx")):
        if not fnmatch(path.stem, models):
            continue
        is_coded = any(n.op_type in CODES for n in onnx.load(path, load_external_data=False).graph.node)
        if "own" in forms:
            yield measure(path.stem, "as exported" if is_coded else "float", path, settings)
        for form, make in FORMS.items():
            if is_coded or form not in forms:
                continue
            with tempfile.TemporaryDirectory() as temporary:
                target = Path(temporary) / "model.onnx"
                try:
                    make(path, target)
                except Exception as error:  # the quantizer's own limits, of any kind
                    yield Line(path.stem, form, note=f"the quantizer failed: {type(error).__name__}")
                    continue
                yield measure(path.stem, form, target, settings)


def show(line: Line) -> str:
    """Return a row of the table."""
    if not line.parameters:
        return f"| {line.model} | {line.form} | | | | | | {line.note} |"
    shares = f"{line.possible:.2f} | {line.removed:.2f}"
    start = f"| {line.model} | {line.form} | {line.parameters / 1000:.0f} K | {shares}"
    return f"{start} | {line.exact} | {line.seconds:.1f} | {line.note} |"


# -- memory ------------------------------------------------------------------------------------------------------------


def decoder(path: Path, size: float, width: int = 2048) -> None:
    """Write a decoder of random float32 weights of about ``size`` bytes, most of them external.

    Every layer is a normalisation, a gated network of 4 times the width, and a residual sum.
    """
    layers = max(1, round(size / (4 * 3 * 4 * width * width)))
    rng, nodes, tensors = np.random.default_rng(0), [], []

    def add(kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        output = f"t{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_{len(nodes)}", domain=domain, **attributes))
        return output

    with path.with_suffix(".data").open("wb") as file:

        def weight(*shape: int) -> str:
            tensor = TensorProto(name=f"w{len(tensors)}", data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            values = rng.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)
            facts = {"location": path.with_suffix(".data").name, "offset": file.tell(), "length": values.nbytes}
            for key, value in facts.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(values.tobytes())
            tensors.append(tensor)
            return tensor.name

        tensors.append(numpy_helper.from_array(np.ones(width, np.float32), "ones"))
        x = "x"
        for _ in range(layers):
            normal = add("SimplifiedLayerNormalization", x, "ones", axis=-1, epsilon=1e-5)
            gate = add("MatMul", normal, weight(width, 4 * width))
            value = add("MatMul", normal, weight(width, 4 * width))
            hidden = add("Mul", add("Mul", gate, add("Sigmoid", gate)), value)
            x = add("Add", x, add("MatMul", hidden, weight(4 * width, width)))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "length", width]) for n in ("x", x)]
    graph = helper.make_graph(nodes, "decoder", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def memory(size: float) -> None:
    """Prune and prove a large decoder, then repair it as well, each in a process of its own; print the largest sets."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decoder.onnx"
        decoder(path, size)
        weights = path.with_suffix(".data").stat().st_size
        data = path.with_name("sequences.npy")
        np.save(data, np.random.default_rng(1).standard_normal((8, 128, 2048), np.float32))
        print("| weights | run | exit code | peak of memory / weights | seconds |\n|--:|---|--:|--:|--:|")
        runs = {"pruned and proved": [], "repaired from 8 sequences, too": ["--data", str(data)]}
        for what, options in runs.items():
            arguments = ["--ratio", "0.3", "-o", str(path.with_name("pruned.onnx")), *options]
            start = time.perf_counter()
            with subprocess.Popen(
                [sys.executable, "-m", "onnxprune", str(path), *arguments], stdout=subprocess.DEVNULL
            ) as run:
                _, status, usage = os.wait4(run.pid, 0)
                run.returncode = os.waitstatus_to_exitcode(status)
            share, seconds = usage.ru_maxrss * 1024 / weights, time.perf_counter() - start
            print(f"| {weights / 1e9:.2f} GB | {what} | {run.returncode} | {share:.2f} | {seconds:.0f} |", flush=True)


def main() -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="folder of *.onnx")
    parser.add_argument("--models", default="*", help="pattern of file names without their ending")
    parser.add_argument("--forms", default=",".join(["own", *FORMS]), help="own, or names of forms, comma-separated")
    parser.add_argument("--cache-heads", action="store_true", help="prune heads whose caches are inputs and outputs")
    parser.add_argument("--no-proof", action="store_true", help="shares alone, in a tenth of the time")
    parser.add_argument("--rotate", default="auto", help="as the option of onnxprune")
    parser.add_argument("--memory", metavar="SIZE", help="measure the memory of a decoder of this size instead: 1.5GB")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.memory:
        found = re.fullmatch(r"([\d.]+) ?(MB|GB)", arguments.memory)
        if found is None:
            parser.error(f"--memory {arguments.memory!r}: a number and MB or GB, such as 1.5GB")
        memory(float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]])
        return
    if arguments.folder is None or not any(arguments.folder.glob("*.onnx")):
        parser.error("give a folder that holds *.onnx, or --memory")
    forms = arguments.forms.split(",")
    if unknown := [f for f in forms if f not in ("own", *FORMS)]:
        parser.error(f"unknown form {unknown[0]!r}: one of own, {', '.join(FORMS)}")
    settings = {"cache_heads": arguments.cache_heads, "rotate": arguments.rotate, "validate": not arguments.no_proof}
    print("| model | weights | elements | can go | goes at 0.3 | exact | seconds | below 0.28 because |")
    print("|---|---|--:|--:|--:|---|--:|---|")
    for line in lines(arguments.folder, arguments.models, forms, settings):
        print(show(line), flush=True)


if __name__ == "__main__":
    main()
