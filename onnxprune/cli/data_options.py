"""The options for calibration data, which every command takes that runs models on the user's inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxprune.cli import options
from onnxprune.cli.layout import option
from onnxprune.errors import UsageError

if TYPE_CHECKING:
    from onnxprune.runtime.images import ImageOptions

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

LAYOUTS = ("nchw", "nhwc")
ORDERS = ("rgb", "bgr")


class SizeType(_ParamType):
    """``HxW``, or one number for both."""

    name = "HxW|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(height, width); raises UsageError."""
        if isinstance(value, tuple):
            return value
        sizes = str(value).lower().replace("\N{MULTIPLICATION SIGN}", "x").split("x")
        if len(sizes) > 2 or not all(size.strip().isdecimal() and int(size) for size in sizes):
            raise UsageError(
                f"{options.flag(param)}: {value!r} is not a size",
                hint="Give height and width in pixels, for example 224x320, or one number for both.",
            )
        return int(sizes[0]), int(sizes[-1])


class NumbersType(_ParamType):
    """Numbers with commas between them, one per channel or one for all."""

    name = "A,B,C"

    def __init__(self, *, counts: tuple[int, ...] = (1, 3), zero: bool = True) -> None:
        self.counts, self.zero = counts, zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers; raises UsageError."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in self.counts or not all(math.isfinite(n) and (self.zero or n) for n in numbers):
            several = " or 3 numbers with commas between them" if len(self.counts) > 1 else " number"
            other = "" if self.zero else ", none of them 0" if len(self.counts) > 1 else " other than 0"
            raise UsageError(f"{options.flag(param)}: {value!r} is not allowed", hint=f"Give 1{several}{other}.")
        return numbers


class OneOfType(_ParamType):
    """One word of a few."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.name = "|".join(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word in lower case; raises UsageError."""
        if str(value).lower() not in self.words:
            raise UsageError(
                f"{options.flag(param)}: {value!r} is not allowed", hint=f"Give {' or '.join(self.words)}."
            )
        return str(value).lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """What was said about the user's inputs."""

    data: Path | None
    samples: int | None
    batch_size: int | None
    image_size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    layout: str | None
    pixel_order: str | None
    pixel_scale: tuple[float, ...] | None

    def check(self) -> None:
        """Whether the data is there, and asked for where an option speaks of it; raises UsageError."""
        if self.data is not None:
            options.existing(self.data, "data", folder_allowed=True)
            return
        for name in (entry.name for entry in fields(self)):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} says how to read data, and there is no --data",
                    hint="Give --data, or drop the option.",
                )

    def arguments(self) -> dict[str, Any]:
        """``data``, ``samples``, ``batch_size`` and ``images`` as the functions of the package take them."""
        reading = {"samples": self.samples, "batch_size": self.batch_size}
        return {"data": self.data, **reading, "images": self._images()}

    def _images(self) -> ImageOptions | None:
        """What was said about images, None for nothing."""
        given: dict[str, Any] = {
            "size": self.image_size,
            "mean": self.mean,
            "std": self.std,
            "layout": self.layout,
            "order": self.pixel_order,
            "scale": self.pixel_scale and self.pixel_scale[0],
        }
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return None
        from onnxprune.runtime.images import ImageOptions  # heavy: waits until the arguments are known to be good

        return ImageOptions(**given)


def data_options(heading: str, use: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options under ``heading``; the command gets them as one argument ``data``, a :class:`DataOptions`.

    Args:
        use: what the data is for, the end of the help of ``--data``.
    """
    add = functools.partial(option, heading=heading)
    added = [
        add(
            "--data",
            type=click.Path(path_type=Path),
            metavar="FILE|DIR",
            help=f"Inputs: .npz (one array per input name), .npy, a folder of such, or a folder of images; {use}",
        ),
        add("--samples", type=options.NumberType(1, "how many samples to use"), help="Use N samples of the data."),
        add(
            "--batch-size",
            type=options.NumberType(1, "how many samples to run at a time"),
            help="Samples per run where the model leaves it open; default 16.",
        ),
        add("--image-size", type=SizeType(), metavar="HxW|N", help="Size of images, cut to it; default the model's."),
        add("--mean", type=NumbersType(), help="Subtract this from pixels of 0..1, per channel."),
        add("--std", type=NumbersType(zero=False), help="Then divide by this, per channel."),
        add(
            "--layout",
            type=OneOfType(*LAYOUTS),
            metavar="|".join(LAYOUTS),
            help="Where images have their channels; default: the axis of size 1 or 3.",
        ),
        add(
            "--pixel-order",
            type=OneOfType(*ORDERS),
            metavar="|".join(ORDERS),
            help="Order of the channels; default rgb.",
        ),
        add(
            "--pixel-scale",
            type=NumbersType(counts=(1,), zero=False),
            metavar="X",
            help="Factor for pixels of 0..255, before --mean; default 1/255.",
        ),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def packed(*args: Any, **values: Any) -> Any:
            own = {entry.name: values.pop(entry.name) for entry in fields(DataOptions)}
            return command(*args, data=DataOptions(**own), **values)

        return functools.reduce(lambda wrapped, put: put(wrapped), reversed(added), packed)

    return decorate
