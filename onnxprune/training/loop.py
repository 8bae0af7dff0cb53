"""The loop: steps until a number or a time is reached, judged on the hold-out, with the best weights kept."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from onnxprune.runtime.sessions import Array, Feed
from onnxprune.training.step import Adam, Parameters, Step, Vector, rate_at

Draw = Callable[[int], list[Feed]]
"""Number of a step -> its calls, with everything that the loss reads."""
Judge = Callable[[], float]
"""Distance of the model with the present weights from the original on the hold-out: smaller is better."""
Uncertainty = Callable[[float], float]
"""Standard error of such a distance."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Length of a training: the first limit that is reached ends it.

    Attributes:
        steps: number of steps, 1 or more; None: no limit.
        seconds: time; None: no limit.
        patience: share of it after which a training ends where no weights were better than those before, above 0.
    """

    steps: int | None = None
    seconds: float | None = None
    patience: float = 1.0

    def progress(self, step: int, seconds: float) -> float:
        """Return the share that is done."""
        shares = [step / self.steps if self.steps else 0.0, seconds / self.seconds if self.seconds else 0.0]
        return min(1.0, max(shares))

    def part(self, share: float) -> Effort:
        """Return a share of this effort."""
        steps = max(1, round(self.steps * share)) if self.steps else None
        return replace(self, steps=steps, seconds=(self.seconds or 0) * share or None)


@dataclass(slots=True)
class Course:
    """The course of a training.

    Attributes:
        steps: number of steps.
        seconds: time of the steps and their judgements.
        losses: loss of every step.
        curve: (step, distance from the original on the hold-out), the first before any step.
        best: the step whose weights were the best; 0: those before.
        stopped: reason for an early end; empty where there was none.
    """

    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    stopped: str = ""

    @property
    def ends(self) -> list[float]:
        """The first loss and the mean of the last 20; empty without steps."""
        return [self.losses[0], float(np.mean(self.losses[-20:]))] if self.losses else []

    def state(self) -> dict[str, Array]:
        """Return everything as arrays."""
        return {
            "numbers": np.asarray([self.steps, self.best], np.int64),
            "seconds": np.asarray(self.seconds),
            "losses": np.asarray(self.losses, np.float64),
            "curve": np.asarray(self.curve, np.float64).reshape(-1, 2),
            "stopped": np.asarray(self.stopped),
        }

    def restore(self, state: Mapping[str, Any]) -> Course:
        """Return to a state; return the course itself."""
        self.steps, self.best = (int(n) for n in state["numbers"])
        self.seconds, self.stopped = float(state["seconds"]), str(state["stopped"])
        self.losses = [float(x) for x in state["losses"]]
        self.curve = [(int(a), float(b)) for a, b in state["curve"]]
        return self


class Keeper(Protocol):
    """Storage of the state of a training: one that was broken off goes on from there."""

    def load(self) -> Mapping[str, Any] | None:
        """Return the arrays that were saved last; None where there are none."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep arrays in place of those before."""

    def clear(self) -> None:
        """Delete the stored state: the training is finished."""


EVALUATIONS = 10
"""Number of comparisons on the hold-out during a training."""
_GROWTH, _MARGIN = 2.0, 1.0  # steps are taken back from this distance on: relative to the best one, and a point more
_RETREATS = 3
_RAMP = 10  # steps after a retreat in which the step size comes back: the first ones have the sign of one gradient


def train(
    step: Step,
    optimizer: Adam,
    parameters: Parameters,
    draw: Draw,
    judge: Judge,
    effort: Effort,
    rate: float,
    uncertainty: Uncertainty = lambda distance: 0.0,
    progress: Callable[[float], None] = lambda share: None,
    keeper: Keeper | None = None,
    least_gain: float = 0.0,
) -> Course:
    """Train weights, and leave the best of them in ``parameters``.

    At every tenth of the effort the weights are judged. Where they are more than a point farther from the original than
    those before any step, training goes on from the best ones with half the step size. So it does where they are more
    than twice as far as the best ones, or the loss is no number; the third time of these, it ends.
    An interruption (SIGINT) ends it, too, and keeps the best. With a keeper, its state is saved at every judgement and
    at an interruption, and a training that was broken off goes on from there: ``draw`` has to give the same calls for
    the same number. Weights at the end of a training that was not broken off
    have had the smallest steps: they are kept where they are as good as the best within the uncertainty of that, and
    better than those before. Weights that are better than those before by no more than ``least_gain`` are not kept.
    """
    course = Course()
    guard = _Guard(parameters, judge, course, least_gain)
    state = _State(course, guard, optimizer, parameters, rate, keeper)
    if not state.resume():
        guard.look(0)
    start = time.monotonic() - course.seconds
    # Threads of the optimiser's small products would wait for work on the cores that the step needs.
    with interruptible() as interrupted, threadpool_limits(limits=1, user_api="blas"):
        while (share := effort.progress(course.steps, time.monotonic() - start)) < 1:
            if interrupted.is_set():
                course.stopped = "interrupted"
                break
            loss = step(draw(course.steps))
            course.losses.append(loss)
            course.steps += 1
            sound = math.isfinite(loss) and bool(np.isfinite(step.gradient).all())
            if sound:
                optimizer.update(step.gradient, state.ramp * rate_at(share, state.rate), share)
            share = effort.progress(course.steps, time.monotonic() - start)
            if sound and share * EVALUATIONS < state.due and share < 1:
                continue
            state.due = 1 + int(share * EVALUATIONS)
            progress(share)
            distance = guard.look(course.steps) if sound else math.inf
            if effort.patience <= share < 1 and not course.best:
                course.stopped = "no step came closer to the original"
            elif distance > min(course.curve[0][1], _GROWTH * guard.distance) + _MARGIN:
                state.retreat(distance, sound)
            if course.stopped:
                break
            course.seconds = time.monotonic() - start
            state.save()
    course.seconds = time.monotonic() - start
    state.end()
    guard.settle(uncertainty)
    return course


@dataclass(slots=True)
class _State:
    """Everything that a training goes on from."""

    course: Course
    guard: _Guard
    optimizer: Adam
    parameters: Parameters
    rate: float
    keeper: Keeper | None
    retreats: int = 0
    due: int = 1

    @property
    def ramp(self) -> float:
        """Share of the step size that the next step has: less than 1 in the first steps after a retreat."""
        is_first = self.optimizer.count == self.course.steps - 1
        return 1.0 if is_first else min(1.0, (self.optimizer.count + 1) / _RAMP)

    def retreat(self, distance: float, sound: bool) -> None:
        """Go on from the best weights with half the step size; stop the course where it has gone too far too often."""
        self.retreats += distance > _GROWTH * self.guard.distance + _MARGIN
        if self.retreats == _RETREATS:
            self.course.stopped = "the distance from the original grew" if sound else "the loss was no number"
            return
        self.guard.restore()
        self.optimizer.reset()
        self.rate /= 2

    def save(self) -> None:
        """Keep the state, where there is a keeper."""
        if self.keeper is None:
            return
        self.keeper.save(
            {
                **self.course.state(),
                "retreats": np.asarray([self.retreats, self.due], np.int64),
                "reals": np.asarray([self.rate, self.guard.distance]),
                "weights": self.parameters.vector,
                "best": self.guard.best,
                **self.optimizer.state(),
            }
        )

    def resume(self) -> bool:
        """Resume from the stored state; return whether there was one that fits."""
        arrays = None if self.keeper is None else self.keeper.load()
        if arrays is None or np.shape(arrays["weights"]) != self.parameters.vector.shape:
            return False
        self.course.restore(arrays).stopped = ""
        self.retreats, self.due = (int(n) for n in arrays["retreats"])
        self.rate, self.guard.distance = (float(x) for x in arrays["reals"])
        self.parameters.vector[:], self.guard.best[:] = arrays["weights"], arrays["best"]
        self.optimizer.restore(arrays)
        return True

    def end(self) -> None:
        """Keep the state of a training that was interrupted, and forget that of one that was finished."""
        if self.course.stopped == "interrupted":
            self.save()
        elif self.keeper is not None:
            self.keeper.clear()


class _Guard:
    """The best weights so far."""

    def __init__(self, parameters: Parameters, judge: Judge, course: Course, least_gain: float) -> None:
        self._parameters, self._judge, self._course, self._least_gain = parameters, judge, course, least_gain
        self.best: Vector = parameters.vector.copy()
        self.distance = math.inf

    def look(self, step: int) -> float:
        """Judge the present weights, and keep them where they are the best; return their distance."""
        distance = self._judge() if np.isfinite(self._parameters.vector).all() else math.inf
        distance = math.inf if math.isnan(distance) else distance
        self._course.curve.append((step, distance))
        least = self._least_gain if step and not self._course.best else 0.0
        if distance < self.distance - least:
            self.distance, self._course.best = distance, step
            self.best[:] = self._parameters.vector
        return distance

    def settle(self, uncertainty: Uncertainty) -> None:
        """Keep the present weights where the training was finished with them and they are as good; else the best."""
        (_, before), (step, last) = self._course.curve[0], self._course.curve[-1]
        finished = step == self._course.steps and not self._course.stopped
        if finished and last < before - self._least_gain and last <= self.distance + uncertainty(self.distance):
            self._course.best = step
            return
        self.restore()

    def restore(self) -> None:
        """Return to the best weights."""
        self._parameters.vector[:] = self.best


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Set an event at the first SIGINT; the second one interrupts as usual. In other threads nothing changes."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before: Any = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
