"""Synthetic inputs that a model really runs on: two batch and sequence sizes where it can, else what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onnxprune.errors import ModelError
from onnxprune.runtime.inputs import bind_shapes, synthetic
from onnxprune.runtime.sessions import Feed, InputSpec, input_specs, open_session, run

_SIZES = ((2, 16), (3, 24))
# a batch of 1 is often baked into a graph whose batch is declared free; audio models want longer sequences
_FALLBACKS = ((1, 16), (2, 512), (1, 512))


def probe_feeds(
    model: Path | bytes,
    *,
    overrides: Mapping[str, Sequence[int]] | None = None,
    bounds: Mapping[str, tuple[int, int]] | None = None,
    sizes: Sequence[tuple[int, int]] = _SIZES,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[list[Feed], str]:
    """Seeded inputs for every (batch, sequence) of ``sizes`` that the model runs on, and a note on the others.

    Sizes that lead to the same shapes (a fully fixed model) give one feed. Where the model runs on none of them,
    batch 1 and longer sequences are tried, one by one, until one runs.

    Raises:
        ModelError: the model does not load, or runs on no size tried (the first failure's message).
        UsageError: an override or bounds that do not fit (see ``bind_shapes``, ``synthetic``).
    """
    session = open_session(model, optimize=False, threads=threads)
    specs = input_specs(session)
    feeds: list[Feed] = []
    seen: set[tuple[tuple[int, ...], ...]] = set()
    failures: list[str] = []
    for index, (batch, sequence) in enumerate([*sizes, *_FALLBACKS]):
        if index >= len(sizes) and feeds:
            break
        shapes = bind_shapes(specs, batch=batch, sequence=sequence, overrides=overrides or {})
        if tuple(shapes.values()) in seen:
            continue
        seen.add(tuple(shapes.values()))
        feed = synthetic(specs, shapes, bounds=bounds, seed=seed + index)
        try:
            run(session, feed)
        except ModelError as error:
            failures.append(f"{_text(specs, shapes)}: {error.message}")
        else:
            feeds.append(feed)
    if not feeds:
        raise ModelError(
            f"the model runs on no synthetic input that was tried; with {failures[0]}",
            hint="Give --input-shape NAME=SIZES for its inputs, or real inputs with --data, or use --no-validate.",
        )
    note = f"the model does not run on every size tried; with {failures[0]}" if failures else ""
    return feeds, note


def _text(specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The shapes as the command line takes them, of the first few inputs."""
    return " ".join(f"{spec.name}={','.join(map(str, shapes[spec.name])) or 'scalar'}" for spec in specs[:4])
