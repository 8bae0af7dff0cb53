"""Folders of images as samples: which files, in which order, what becomes of their pixels, what is refused."""

from __future__ import annotations

import builtins
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.graph.probes import InputSpec
from onnxprune.runtime.data import open_data
from onnxprune.runtime.images import ImageOptions, image_files

Image = pytest.importorskip("PIL.Image")


def spec(*shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec("x", np.dtype(dtype), shape)


NCHW = spec("N", 3, 8, 8)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray = PIXELS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def flat(value: int, height: int = 8, width: int = 8) -> np.ndarray:
    """An image of one grey."""
    return np.full((height, width, 3), value, np.uint8)


def one(folder: Path, model: InputSpec, **options: Any) -> np.ndarray:
    """The array of a single image."""
    (feed,) = open_data(folder, [model], images=ImageOptions(**options) if options else None)
    return feed["x"]


def message(folder: Path, *models: InputSpec, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        list(open_data(folder, models or [NCHW], images=ImageOptions(**options) if options else None))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_pixels_become_what_the_input_says(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    scaled = PIXELS.astype(np.float32) / 255
    assert np.allclose(one(tmp_path, NCHW), scaled.transpose(2, 0, 1)[None])
    assert np.allclose(one(tmp_path, spec("N", 8, 8, 3)), scaled[None])
    assert np.array_equal(one(tmp_path, spec(1, 3, 8, 8, dtype=np.uint8)), PIXELS.transpose(2, 0, 1)[None])
    assert np.array_equal(one(tmp_path, spec("N", 8, 8, 3, dtype=np.int32)), PIXELS[None].astype(np.int32))
    half = one(tmp_path, spec("N", 3, 8, 8, dtype=np.float16))
    assert half.dtype == np.float16 and np.allclose(half, scaled.transpose(2, 0, 1)[None], atol=1e-3)
    grey = np.asarray(Image.fromarray(PIXELS).convert("L")).astype(np.float32) / 255
    assert np.allclose(one(tmp_path, spec("N", 1, 8, 8)), grey[None, None])
    assert np.allclose(one(tmp_path, spec("N", 8, 8, 1)), grey[None, :, :, None])
    assert np.allclose(one(tmp_path, spec("N", 8, 8)), grey[None])


def test_means_and_orders_per_channel(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    wanted = ((PIXELS / 255 - mean) / std).transpose(2, 0, 1)
    assert np.allclose(one(tmp_path, NCHW, mean=mean, std=std), wanted, atol=1e-5)
    turned = (PIXELS[..., ::-1].astype(np.float32) - (104, 117, 124)).transpose(2, 0, 1)
    assert np.allclose(one(tmp_path, NCHW, order="bgr", scale=1.0, mean=(104, 117, 124)), turned, atol=1e-4)
    assert np.allclose(one(tmp_path, NCHW, mean=[0.5], std=[0.25])[0, 0, 0, 0], (PIXELS[0, 0, 0] / 255 - 0.5) / 0.25)


def test_images_are_scaled_to_cover_and_cut_in_the_middle(tmp_path: Path) -> None:
    wide = np.concatenate([flat(0, 16, 8), flat(128, 16, 16), flat(255, 16, 8)], axis=1)  # 16 x 32
    save(tmp_path / "a.png", wide)
    middle = one(tmp_path, NCHW, size=8)
    assert middle.shape == (1, 3, 8, 8)
    assert np.allclose(middle[..., 1:-1], 128 / 255) and middle[0, 0, 0, 0] < 128 / 255 < middle[0, 0, 0, -1]
    assert one(tmp_path, spec("N", 3, "H", "W"), size=(4, 6)).shape == (1, 3, 4, 6)
    assert one(tmp_path, spec("N", 3, 5, "W"), size=(5, 6)).shape == (1, 3, 5, 6)
    assert one(tmp_path, spec(None, None, None, None), size=4, layout="nhwc").shape == (1, 4, 4, 3)


def test_sizes_that_are_square_in_channels_need_a_layout(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    assert "does not tell which axis is the channels" in message(tmp_path, spec("N", 3, 8, 3))
    assert one(tmp_path, spec("N", 3, 8, 3), layout="nchw").shape == (1, 3, 8, 3)
    assert one(tmp_path, spec("N", 3, 8, 3), layout="nhwc").shape == (1, 3, 8, 3)


def test_models_without_a_batch_axis_take_one_image_at_a_time(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / f"{index}.png", flat(index))
    for shape in ((3, 8, 8), (8, 8, 3)):
        samples = open_data(tmp_path, [spec(*shape, dtype=np.uint8)], samples=2, batch_size=5)
        feeds = list(samples)
        assert samples.samples == 2 and [feed["x"].shape for feed in feeds] == [shape] * 2
        assert [int(feed["x"].mean()) for feed in feeds] == [0, 1]
    with pytest.raises(UsageError, match="holds 3 samples, 4 were asked for"):
        open_data(tmp_path, [spec(3, 8, 8)], samples=4)


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "bmp", "webp"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", flat(100))
    for source in (path, str(tmp_path)):
        (feed,) = open_data(source, [NCHW])
        assert np.allclose(feed["x"], 100 / 255, atol=0.02)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixel_is_read(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    else:
        image = Image.fromarray(flat(255)).convert(mode)
    image.save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    for model in (NCHW, spec("N", 1, 8, 8)):
        assert np.allclose(one(tmp_path, model), 1)


def test_subfolders_take_turns_in_the_order_of_names(tmp_path: Path) -> None:
    for value, name in enumerate(("cat/1.png", "cat/2.png", "cat/3.png", "dog/1.jpg", "dog/2.png", "0.png")):
        save(tmp_path / name, flat(value * 10))
    save(tmp_path / ".hidden" / "no.png")
    (tmp_path / "._cat.png").write_bytes(b"what a file system leaves behind")
    (tmp_path / "labels.txt").write_text("cat dog")
    names = [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)]
    assert names == ["0.png", "cat/1.png", "dog/1.jpg", "cat/2.png", "dog/2.png", "cat/3.png"]
    samples = open_data(tmp_path, [NCHW], samples=5, batch_size=3)
    values = [round(float(x.mean()) * 25.5) for feed in samples for x in feed["x"]]
    assert values == [5, 0, 3, 1, 4] and samples.samples == 5
    assert [len(feed["x"]) for feed in samples] == [3, 2]
    assert [len(feed["x"]) for feed in open_data(tmp_path, [spec(4, 3, 8, 8)])] == [4]


def test_images_are_decoded_batch_by_batch(tmp_path: Path) -> None:
    for index in range(64):
        save(tmp_path / f"{index}.png", flat(index, 4, 4))
    samples = open_data(tmp_path, [spec("N", 3, 128, 128)], batch_size=4)  # 12 MiB altogether
    tracemalloc.start()
    assert sum(len(feed["x"]) for feed in samples) == 64
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20


def test_fingerprints_follow_files_and_options(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png")
    save(tmp_path / "b.png", flat(3))
    same = {open_data(tmp_path, [NCHW]).fingerprint() for _ in range(2)}
    others = [
        open_data(tmp_path, [NCHW], images=ImageOptions(mean=[0.5])),
        open_data(tmp_path, [NCHW], images=ImageOptions(order="bgr")),
        open_data(tmp_path, [NCHW], batch_size=4),
        open_data(tmp_path, [NCHW], samples=1),
        open_data(tmp_path, [spec("N", 8, 8, 3)]),
    ]
    prints = same | {samples.fingerprint() for samples in others}
    save(path, flat(4))
    prints.add(open_data(tmp_path, [NCHW]).fingerprint())
    assert len(same) == 1 and len(prints) == 7 and None not in prints


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "fine.png")
    (tmp_path / "text.jpg").write_text("no image")
    assert "text.jpg' cannot be decoded" in message(tmp_path)
    (tmp_path / "text.jpg").unlink()
    (tmp_path / "short.png").write_bytes(path.read_bytes()[:-60])
    assert "short.png' cannot be decoded" in message(tmp_path)


def test_folders_that_are_no_images(tmp_path: Path) -> None:
    assert "no image (.png, .jpg" in message(tmp_path)
    save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.zeros((1, 3, 8, 8), np.float32))
    assert "holds both arrays (b.npy) and images" in message(tmp_path)
    (tmp_path / "a.png").unlink()
    assert "image options (size, mean, std" in message(tmp_path, size=8)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (spec("N", 3, "H", "W"), "does not tell the size of its images"),
        (spec("N", None, 8, 8), "does not tell which axis is the channels"),
        (spec("N", 4, 8, 8), "1 or 3 channels are needed"),
        (spec(4, 8, 8), "1 or 3 channels are needed"),
        (spec("N", 3), "takes no images"),
        (spec("N", 3, 8, 8, 8), "takes no images"),
        (spec("N", 3, 8, 8, dtype=bool), "of bool takes no images"),
        (spec("N", 3, 8, 8, dtype=object), "takes no images"),
        (spec("N", 3, 8, 8, dtype=np.int8), "0..255; input 'x' (int8) takes -128..127"),
    ],
)
def test_models_that_take_no_images(tmp_path: Path, model: InputSpec, words: str) -> None:
    pixels = PIXELS.copy()
    pixels[0, 0] = (0, 255, 0)
    save(tmp_path / "a.png", pixels)
    assert words in message(tmp_path, model)


def test_models_of_several_inputs(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    text = message(tmp_path, NCHW, InputSpec("mask", np.dtype(np.float32), ("N", 1)))
    assert "the model has 2 inputs: 'x', 'mask'" in text and ".npz" in text


def test_options_that_do_not_fit_the_model(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    assert "mean of the images has 2 numbers; the model's channels need 1 or 3" in message(tmp_path, mean=(0.5, 0.5))
    assert "std of the images has 3 numbers; the model's channels need 1" in message(
        tmp_path, spec("N", 1, 8, 8), std=(1, 1, 1)
    )
    assert "fixes the size of its images, which is not 9" in message(tmp_path, size=9)
    assert "takes uint8 pixels, which are not normalised" in message(
        tmp_path, spec("N", 3, 8, 8, dtype=np.uint8), mean=[0.5]
    )
    assert "has its channels where layout 'nhwc' has none" in message(tmp_path, spec("N", 3, 8, 8), layout="nhwc")
    assert "has 8 channels, images have 1 or 3" in message(tmp_path, spec("N", 8, 8, 8), layout="nhwc")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "nchv"}, "Did you mean 'nchw'?"),
        ({"order": "grb"}, "pixel order 'grb'"),
        ({"size": (0, 4)}, "image size (0, 4)"),
        ({"size": (1, 2, 3)}, "image size (1, 2, 3)"),
        ({"mean": [float("nan")]}, "finite"),
        ({"std": [0.5, 0.0, 1.0]}, "nothing can be divided by 0"),
    ],
)
def test_options_that_no_model_can_take(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        ImageOptions(**options)
    assert words in str(caught.value)


def test_without_pillow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png")
    imported = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "pip install 'onnxprune[images]'" in message(tmp_path)
