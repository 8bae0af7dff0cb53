"""Which branches of its Ifs a model takes, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from onnx import TensorProto

from onnxprune.files import workspace
from onnxprune.graph.view import Graph
from onnxprune.model import markers
from onnxprune.model.exposing import Inner, show
from onnxprune.model.save import save
from onnxprune.model.weights import Weight
from onnxprune.runtime.capture import with_outputs
from onnxprune.runtime.sessions import Array, Feed, open_session, run

Way = Mapping[str, bool]
"""What conditions of Ifs are, {name of the condition: value}; without those that a batch does not come to."""


def ways(graph: Graph, weights: Mapping[str, Weight], feeds: Sequence[Feed]) -> list[dict[str, bool]]:
    """The way that every batch takes through the Ifs that lie in no Loop or Scan; no entries where there are none.

    Raises:
        ModelError: the model does not run.
    """
    opened = [n for n in graph.nodes if n.marker == markers.OPEN and n.kind == "If"]
    names = {n.inputs[0] for n in opened if markers.repeating(graph.around[n.index]) is None}
    found = [_of_one((n, feed[n]) for n in sorted(names & feed.keys())) for feed in feeds]
    constants = _of_one((n, weights[n].read()) for n in sorted(names & weights.keys()))
    made = sorted(names & graph.producer.keys() - weights.keys())
    if made:
        proto, shown = show(graph.proto, dict.fromkeys(made, Inner(TensorProto.BOOL, 0)))
        outputs = {n: shown[n].output if n in shown else n for n in made}
        with workspace() as folder:
            path = folder / "ways.onnx"
            save(with_outputs(proto, [*outputs.values()]), weights, path)
            session = open_session(path, spin=False)
            for way, feed in zip(found, feeds, strict=True):
                values = run(session, feed)
                way.update(_of_one((n, values[o]) for n, o in outputs.items()))
    return [{**constants, **way} for way in found]


def _of_one(values: Iterable[tuple[str, Array]]) -> dict[str, bool]:
    return {name: bool(value.ravel()[0]) for name, value in values if value.size}


def takes(graph: Graph, index: int, way: Way) -> bool:
    """Whether the node at ``index``, or the Loop or Scan around it, runs on a way."""
    return reaches(graph, graph.around[index], way)


def reaches(graph: Graph, around: Sequence[markers.Body], way: Way) -> bool:
    """Whether bodies run on a way, as far as Ifs outside of every Loop and Scan decide it."""
    branches = takewhile(lambda body: body.kind == "If", around)
    return all(way.get(graph.nodes[body.start].inputs[0]) == body.side for body in branches)
