"""The plan: which units are removed from which groups, as data that can be saved, edited and replayed."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import UsageError, argument
from onnxprune.io import files
from onnxprune.report.facts import Rotated, RotatedStream

VERSION = 1


@dataclass(slots=True)
class PlanSlot:
    """Positions removed along one axis of one tensor of the input model.

    ``at`` {axis: position} restricts them to one position of another axis (a direction of a recurrent layer); empty:
    all positions.
    """

    tensor: str
    axis: int = 0
    size: int = 0
    removed: list[int] = field(default_factory=list)
    at: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class PlanGroup:
    """Units removed from one group, and their positions. ``removed`` None: the slots decide."""

    id: int
    units: int = 0
    removed: list[int] | None = None
    slots: list[PlanSlot] = field(default_factory=list)


@dataclass(slots=True)
class PlanFactors:
    """A factorized layer: the name of its node, the ranks of the method, and the error of the approximation.

    ``numbers``: whether factors of a weight of codes are numbers, and not codes themselves.
    """

    layer: str
    method: str
    ranks: list[int]
    error: float = 0.0
    numbers: bool = False


@dataclass(slots=True)
class PlanBranch:
    """A residual branch that is removed: the tensor of the input model that it ends in, and the node that adds it.

    ``keep_cache``: whether the caches of removed branches stay as inputs and outputs.
    """

    tensor: str
    sum: str = ""
    keep_cache: bool = False


@dataclass(slots=True)
class PlanExperts:
    """Experts that are removed from one mixture: the first output of the node that chooses, and their numbers."""

    choice: str
    removed: list[int] = field(default_factory=list)


@dataclass(slots=True)
class PlanVocabulary:
    """The tokens that are left: ids of the input model, rising, the place of each being its new id.

    ``inputs``: inputs of ids; ``size``: number of tokens of the input model; ``keep_ids``: whether the model goes on
    taking ids of the input model.
    """

    inputs: list[str] = field(default_factory=list)
    size: int = 0
    kept: list[int] = field(default_factory=list)
    keep_ids: bool = False


@dataclass(slots=True)
class PlanRotation:
    """A stream of channels that is turned before anything is removed; slots then count its turned channels.

    ``tensor``: the first tensor of the stream; ``energy`` [channels]: share of each turned channel in the second
    moments of the data; ``matrix``: the orthogonal matrix [channels, channels], row-major float32, compressed, base64.
    """

    tensor: str
    size: int
    energy: list[float] = field(default_factory=list)
    matrix: str = ""

    @classmethod
    def of(cls, tensor: str, matrix: NDArray[Any], energy: NDArray[Any]) -> PlanRotation:
        """Pack a matrix."""
        stored = np.ascontiguousarray(matrix, "<f4").tobytes()
        text = base64.b64encode(zlib.compress(stored)).decode("ascii")
        return cls(tensor, len(matrix), [float(f"{share:.4g}") for share in energy], text)

    def values(self) -> NDArray[np.float32]:
        """Return the matrix; of another shape than [size, size] where the text is damaged."""
        try:
            values = np.frombuffer(zlib.decompress(base64.b64decode(self.matrix, validate=True)), "<f4")
        except (ValueError, zlib.error):
            return np.zeros((0, 0), np.float32)
        return values.reshape(self.size, self.size) if values.size == self.size**2 else values


def check_model(of_plan: str, of_model: str, why: str = "") -> None:
    """Check that a plan was made for a model.

    Args:
        of_plan: SHA-256 that the plan names; empty: it is for any model.
        of_model: SHA-256 of the model's file.
        why: sentence in front of the hint, with a space behind it.

    Raises:
        UsageError: the plan names another model.
    """
    if of_plan and of_plan != of_model:
        raise UsageError(
            f"The plan belongs to another model (SHA-256 {of_plan[:12]}..., this one is {of_model[:12]}...).",
            hint=f"{why}Delete 'model_sha256' in the plan to apply it anyway.",
        )


@dataclass(slots=True, repr=False)
class Plan:
    """A frozen decision for one model, named by the SHA-256 of its file.

    ``resize_io``: inputs and outputs of the model that may lose channels. ``reshape_axis``: axis of grids that was
    pruned, where the groups depend on it; empty where they do not.
    """

    model_sha256: str = ""
    criterion: str = ""
    groups: list[PlanGroup] = field(default_factory=list)
    barriers: list[dict[str, Any]] = field(default_factory=list)
    version: int = VERSION
    factorized: list[PlanFactors] = field(default_factory=list)
    branches: list[PlanBranch] = field(default_factory=list)
    experts: list[PlanExperts] = field(default_factory=list)
    resize_io: list[str] = field(default_factory=list)
    reshape_axis: str = ""
    vocabulary: PlanVocabulary | None = None
    rotations: list[PlanRotation] = field(default_factory=list)

    def __repr__(self) -> str:
        units = sum(len(group.removed or ()) for group in self.groups)
        factors = f", {len(self.factorized)} layers factorized" if self.factorized else ""
        branches = f", {len(self.branches)} branches removed" if self.branches else ""
        return f"<Plan: {units} units removed from {len(self.groups)} groups{branches}{factors}>"

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready plain data, in the file's key order."""
        data = asdict(self)
        for slot in (slot for group in data["groups"] for slot in group["slots"] if not slot["at"]):
            del slot["at"]
        for branch in data["branches"]:
            if not branch["keep_cache"]:
                del branch["keep_cache"]
        for name in ("rotations", "branches", "experts", "reshape_axis", "resize_io", "factorized", "vocabulary"):
            if not data[name]:
                del data[name]
        start = ("version", "model_sha256", "criterion", "vocabulary", "reshape_axis", "resize_io", "rotations")
        names = (*start, "branches", "experts", "groups", "barriers", "factorized")
        return {k: data[k] for k in names if k in data}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            UsageError: the file cannot be written.
        """
        files.write_text(Path(path), self.text(), "the plan")

    def text(self) -> str:
        """Return the plan as the text of its file."""
        return _lines(self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            UsageError: missing, not JSON, or not a plan of this version.
        """
        form = f"Write a plan with {argument('plan_file')} to see the form."
        return cls.from_dict(files.read_json(Path(path), "the plan", "plan file", hint=form))

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Build a plan from plain data; keys that a person may leave out have defaults.

        Raises:
            UsageError: the data does not have a plan's form.
        """
        hint = f"Write one with {argument('plan_file')} to see the form."
        if not isinstance(data, Mapping) or not isinstance(data.get("groups"), list):
            raise UsageError("This is not a plan: the list 'groups' is missing.", hint=hint)
        if data.get("version", VERSION) != VERSION:
            raise UsageError(
                f"Plan version {str(data.get('version'))[:40]!r} is not supported.",
                hint=f"This onnxprune reads version {VERSION}.",
            )
        groups = [{"id": i, **g} if isinstance(g, Mapping) else g for i, g in enumerate(data["groups"])]
        return files.parse(cls, {**data, "groups": groups}, "the plan", hint)


def _lines(data: Mapping[str, Any]) -> str:
    """Format JSON with one line per group, slot and barrier: people read plans and edit them."""

    def block(items: list[str], close: str) -> str:
        return "[" + ",".join("\n  " + item for item in items) + close

    groups = []
    for group in data["groups"]:
        slots = block(["  " + json.dumps(slot) for slot in group["slots"]], "]")
        groups.append(f"{json.dumps({**group, 'slots': None})[: -len('null}')]}{slots}}}")
    parts = {**data, "rotations": None, "branches": None, "groups": None, "barriers": None, "factorized": None}
    text = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in parts.items() if v is not None)
    barriers = block([json.dumps(barrier) for barrier in data["barriers"]], "\n ]")
    factors = [json.dumps(item) for item in data.get("factorized", ())]
    tail = f',\n "factorized": {block(factors, chr(10) + " ]")}' if factors else ""
    rotations = block([json.dumps(item) for item in data.get("rotations", ())], "\n ]")
    text += f',\n "rotations": {rotations}' if data.get("rotations") else ""
    branches = block([json.dumps(item) for item in data.get("branches", ())], "\n ]")
    text += f',\n "branches": {branches}' if data.get("branches") else ""
    return f'{{{text},\n "groups": {block(groups, chr(10) + " ]")},\n "barriers": {barriers}{tail}}}\n'


def map_text(entry: PlanVocabulary) -> str:
    """Return the map of ids as the text of its file: {old id: new id}, and the old id of each new one."""
    data = {
        "version": 1,
        "inputs": entry.inputs,
        "size": entry.size,
        "keep_ids": entry.keep_ids,
        "new_id": {str(old): new for new, old in enumerate(entry.kept)},
        "old_id": entry.kept,
    }
    return json.dumps(data) + "\n"


def rotated(plan: Plan) -> list[Rotated]:
    """Return the energy that streams turned by a plan keep, as a fact; none where it turns none."""
    if not plan.rotations:
        return []
    removed = {slot.tensor: slot.removed for group in plan.groups for slot in group.slots}
    streams = []
    for item in plan.rotations:
        lost = set(removed.get(item.tensor, ()))
        share = sum(e for k, e in enumerate(item.energy) if k not in lost) / (sum(item.energy) or 1.0)
        streams.append(RotatedStream(item.tensor, item.size, item.size - len(lost), share))
    return [Rotated(streams)]
