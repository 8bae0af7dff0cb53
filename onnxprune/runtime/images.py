"""Images as samples: a folder of files, resized, cropped and normalised the way the model wants its pixels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import UsageError, argument, nearest
from onnxprune.graph.probes import InputSpec, format_shape
from onnxprune.runtime.arrays import UNNAMED, Arrays, Rows, may_be_read
from onnxprune.runtime.sessions import Array

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
LAYOUTS = ("nchw", "nhwc")
ORDERS = ("rgb", "bgr")

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """Conversion of images to arrays; values of None follow from the model's input.

    An image is scaled, with its proportions kept, until it covers ``size``, and what stands out is cut off at both
    sides (bilinear, antialiased). Its values 0..255 are multiplied by ``scale``, then ``mean`` is subtracted and the
    result divided by ``std``. Integer inputs get the values as they are.

    Args:
        size: height and width, or one number for both; None: the model's fixed ones.
        mean: one number per channel, in the order of the model's channels, or one for all; in units of scaled values,
            so 0..1 by default.
        std: as ``mean``, more than 0.
        layout: ``nchw`` or ``nhwc``; None: where the model has 1 or 3 channels.
        scale: None: 1/255.
        order: of the channels, ``rgb`` or ``bgr``.

    Raises:
        UsageError: a value that is none of these.
    """

    size: tuple[int, int] | int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    layout: str | None = None
    scale: float | None = None
    order: str = "rgb"

    def __post_init__(self) -> None:
        """Check the options that can be checked without a model."""
        for name, value, allowed in (("layout", self.layout, LAYOUTS), ("pixel order", self.order, ORDERS)):
            if value is not None and value not in allowed:
                raise UsageError(f"{name} {value!r} of the images is unknown", hint=nearest(value, allowed))
        if self.size is not None and (len(self.extent or ()) != 2 or min(self.extent or (0,)) < 1):
            raise UsageError(f"image size {self.size}: give height and width in pixels, or one number for both")
        for name, numbers in (("mean", self.mean), ("std", self.std), ("scale", [self.scale or 1.0])):
            if numbers is not None and not all(math.isfinite(number) for number in numbers):
                raise UsageError(f"{name} {list(numbers)} of the images: give finite numbers")
        if self.std is not None and not all(self.std):
            raise UsageError(f"std {list(self.std)} of the images: nothing can be divided by 0")

    @property
    def extent(self) -> tuple[int, ...] | None:
        """Height and width."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size and tuple(self.size)


@dataclass(frozen=True, slots=True)
class Form:
    """The arrays that a model wants: where channels stand (``axis`` of one image, None: there are none), how many."""

    name: str
    axis: int | None
    channels: int
    height: int
    width: int
    dtype: np.dtype[Any]
    batched: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        sizes = [self.height, self.width]
        if self.axis is not None:
            sizes.insert(self.axis, self.channels)
        return tuple(sizes)


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder and its subfolders by name, alternating between subfolders (often classes).

    So the first n images are spread over the subfolders, however many are asked for. Hidden files are left out, and so
    is what bears an image's name and is a folder, a pipe or a socket.
    """
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and may_be_read(path))
    names = sorted(path.relative_to(folder) for path in paths)
    stem_counts: Counter[Path] = Counter()
    numbered_names = []
    for name in names:
        if not any(piece.startswith(".") for piece in name.parts):
            stem_counts[name.parent] += 1
            numbered_names.append((stem_counts[name.parent], name))
    return [folder / name for _, name in sorted(numbered_names)]


@dataclass(slots=True)
class Folder:
    """Images as the samples of a model's only input, decoded batch by batch.

    Raises:
        UsageError: no Pillow, a model whose input takes no images, a size or layout that nothing tells, numbers of
            means that are not those of the channels.
    """

    path: Path
    files: Sequence[Path]
    specs: Sequence[InputSpec]
    options: ImageOptions | None
    form: Form = field(init=False)

    def __post_init__(self) -> None:
        """Derive the layout from the model's input."""
        _pillow()
        self.options = self.options or ImageOptions()
        if len(self.specs) != 1:
            names = ", ".join(repr(spec.name) for spec in self.specs[:6])
            raise UsageError(
                f"data {str(self.path)!r} is images, and the model has {len(self.specs)} inputs: {names}",
                hint="Give .npz files with an array for every input.",
            )
        self.form = _form(self.specs[0], self.options)
        for name, numbers in (("mean", self.options.mean), ("std", self.options.std)):
            if numbers is not None and len(numbers) not in (1, self.form.channels):
                allowed = f"1 or {self.form.channels}" if self.form.channels > 1 else "1"
                raise UsageError(
                    f"{name} of the images has {len(numbers)} numbers; the model's channels need {allowed}"
                )
        normalised = self.options.mean or self.options.std or self.options.scale
        if self.form.dtype.kind in "iu" and normalised:
            raise UsageError(
                f"input {self.form.name!r} takes {self.form.dtype} pixels, which are not normalised",
                hint="Drop mean, std and scale.",
            )

    @property
    def unit(self) -> int:
        """Rows of the array that make up one image: more than one where the input has no batch axis."""
        return 1 if self.form.batched else self.form.shape[0]

    def part(self) -> Arrays:
        """Return all images as one array."""
        tail = self.form.shape if self.form.batched else self.form.shape[1:]
        dtype = np.dtype(np.uint8 if self.form.dtype.kind in "iu" else np.float32)
        shape = (len(self.files) * self.unit, *tail)
        return {UNNAMED: Rows(shape, dtype, self._chunks, f"the images in {str(self.path)!r}")}

    def _chunks(self, rows: int) -> Iterator[Array]:
        step = rows // self.unit
        for start in range(0, len(self.files), step):
            images = np.stack([self._array(path) for path in self.files[start : start + step]])
            yield images if self.form.batched else images.reshape(-1, *images.shape[2:])

    def stamp(self, count: int) -> Iterator[bytes]:
        """Return the bytes that stand for the first images: the files, the options, and the decoder's version."""
        yield repr((self.options, _pillow().__version__)).encode()
        for path in islice(self.files, count):
            yield path.stat().st_size.to_bytes(8, "little")
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block

    def _array(self, path: Path) -> Array:
        """Return one image in the model's layout."""
        form, options = self.form, self.options
        assert options is not None
        pixels = _decode(path, form)
        if options.order == "bgr":
            pixels = pixels[..., ::-1]
        if form.dtype.kind not in "iu":
            values = pixels.astype(np.float32) * np.float32(1 / 255 if options.scale is None else options.scale)
            values -= np.asarray(0.0 if options.mean is None else options.mean, np.float32)
            values /= np.asarray(1.0 if options.std is None else options.std, np.float32)
            pixels = values
        return pixels.transpose(2, 0, 1) if form.axis == 0 else pixels.reshape(form.shape)


def _pillow() -> Any:
    """Pillow's package."""
    try:
        import PIL
    except ImportError:
        raise UsageError(
            "images as data need Pillow, which is not installed", hint="pip install 'onnxprune[images]'"
        ) from None
    return PIL


def _decode(path: Path, form: Form) -> Array:
    """Pixels 0..255 as [height, width, channels], cut and scaled to size."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            image: Image.Image = picture
            if image.mode.startswith("I"):  # 16 bits of grey, which a plain conversion cuts off at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            image = image.convert("L" if form.channels == 1 else "RGB")
            fitted = ImageOps.fit(image, (form.width, form.height), Image.Resampling.BILINEAR)
            return np.asarray(fitted).reshape(form.height, form.width, form.channels)
    except MemoryError:
        raise
    except Exception as error:  # what a decoder raises on a damaged file depends on the format
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"image {str(path)!r} cannot be decoded: {lines[0]}") from error


def _form(spec: InputSpec, options: ImageOptions) -> Form:
    """Return the layout of the input, from its shape and, where that is open, the options."""
    description = f"input {spec.name!r} {format_shape(spec.shape)}"
    if len(spec.shape) not in (3, 4) or spec.dtype.kind in "OcSb":
        raise UsageError(f"{description} of {spec.dtype} takes no images", hint="Give the data as arrays (.npz).")
    dims = spec.shape[1:] if len(spec.shape) == 4 else spec.shape
    if len(spec.shape) == 3 and not any(isinstance(dims[axis], int) and dims[axis] in (1, 3) for axis in (0, 2)):
        if isinstance(dims[0], int):
            raise UsageError(f"{description} takes no images: 1 or 3 channels are needed")
        axis, channels, extent, batched = None, 1, dims[1:], True  # grey images without an axis of channels
    else:
        axis, batched = _channel_axis(description, dims, options.layout), len(spec.shape) == 4
        size = dims[axis]
        channels, extent = (size if isinstance(size, int) else 3), tuple(d for i, d in enumerate(dims) if i != axis)
    if channels not in (1, 3):
        raise UsageError(
            f"{description} has {channels} channels, images have 1 or 3", hint="Give the data as arrays (.npz)."
        )
    height, width = _extent(description, extent, options)
    return Form(spec.name, axis, channels, height, width, spec.dtype, batched)


def _channel_axis(description: str, dims: Sequence[int | str | None], layout: str | None) -> int:
    """Return the axis of the channels in an image's shape."""
    if layout is not None:
        axis, other = (0, 2) if layout == "nchw" else (2, 0)
        if dims[axis] not in (1, 3) and dims[other] in (1, 3):
            raise UsageError(
                f"{description} has its channels where layout {layout!r} has none", hint="Drop the layout."
            )
        return axis
    candidates = [axis for axis in (0, 2) if dims[axis] in (1, 3)]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates and all(isinstance(dims[axis], int) for axis in (0, 2)):
        raise UsageError(
            f"{description} takes no images: 1 or 3 channels are needed", hint="Give the data as arrays (.npz)."
        )
    raise UsageError(
        f"{description} does not tell which axis is the channels",
        hint=f"Say it with {argument('layout')} nchw or nhwc (Python: images=ImageOptions(layout=...)).",
    )


def _extent(description: str, dims: Sequence[int | str | None], options: ImageOptions) -> tuple[int, int]:
    """Height and width of the images."""
    extent = options.extent
    sizes = []
    for axis, dim in enumerate(dims):
        size = dim if isinstance(dim, int) else extent[axis] if extent is not None else None
        if size is None:
            raise UsageError(
                f"{description} does not tell the size of its images",
                hint=f"Give it with {argument('image_size')} HxW (Python: images=ImageOptions(size=...)).",
            )
        if extent is not None and extent[axis] != size:
            extent_text = "\N{MULTIPLICATION SIGN}".join(map(str, extent))
            raise UsageError(f"{description} fixes the size of its images, which is not {extent_text}")
        sizes.append(size)
    return sizes[0], sizes[1]
