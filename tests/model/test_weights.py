from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import ModelError
from onnxprune.io.constants import weight_from_constant
from onnxprune.io.elements import align_array
from onnxprune.io.weights import ArrayWeight, BufferWeight, FileWeight, GatheredWeight, TensorWeight, to_proto

DTYPES = [
    *(np.dtype(t) for t in ("f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16")),
    *(np.dtype(getattr(ml_dtypes, n)) for n in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4")),
]


def sample(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2 if dtype.kind == "b" else 7, shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 5, 1)], ids=str)
def test_every_kind_of_weight_reads_the_same(dtype: np.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = sample(shape, dtype)
    weight = ArrayWeight("w", array)
    proto = to_proto(weight)
    (tmp_path / "data").write_bytes(b"??" + bytes(weight.stored()))
    others = [
        TensorWeight(proto),
        BufferWeight("w", weight.onnx_type, shape, proto.raw_data),
        FileWeight("w", weight.onnx_type, shape, tmp_path / "data", 2, weight.nbytes),
        FileWeight("w", weight.onnx_type, shape, tmp_path / "data", 2),
    ]
    for other in [weight, *others]:
        assert (other.name, other.shape, other.dtype, other.nbytes) == ("w", shape, dtype, len(proto.raw_data))
        assert other.read().dtype == dtype and other.read().shape == shape
        assert np.array_equal(other.read(), array)
        assert bytes(other.stored()) == proto.raw_data
    assert np.array_equal(numpy_helper.to_array(proto), array)


@pytest.mark.parametrize("kind", sorted(set(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}))
def test_typed_fields_of_every_element_type(kind: int) -> None:
    values = [b"a", b"\xc3\xa9"] if kind == TensorProto.STRING else [1, 0]
    proto = helper.make_tensor("w", kind, [2], values)
    assert not proto.raw_data
    weight = TensorWeight(proto)
    expected = np.array(["a", "é"], object) if kind == TensorProto.STRING else numpy_helper.to_array(proto)
    assert np.array_equal(weight.read(), expected)
    assert weight.nbytes == (3 if kind == TensorProto.STRING else len(to_proto(weight).raw_data))
    assert np.array_equal(TensorWeight(to_proto(weight)).read(), expected)


def test_what_is_read_cannot_be_changed_by_accident() -> None:
    array = np.ones(3, np.float32)
    weight = ArrayWeight("w", array)
    with pytest.raises(ValueError, match="read-only"):
        weight.read()[0] = 2
    array[0] = 5  # the caller's own array stays writable
    with pytest.raises(ValueError, match="read-only"):
        BufferWeight("w", TensorProto.FLOAT, [1], bytes(4)).read()[0] = 2


@st.composite
def gathers(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    array = np.arange(np.prod(shape)).reshape(shape)
    steps = []
    for _ in range(draw(st.integers(0, 3))):
        axis = draw(st.integers(0, len(shape) - 1))
        count = draw(st.integers(1, 4))
        many = draw(st.booleans())
        wanted = [size if draw(st.booleans()) else 1 for size in shape] if many else [count]
        if many:
            wanted[axis] = count
        cells = int(np.prod(wanted))
        flat = draw(st.lists(st.integers(0, shape[axis] - 1), min_size=cells, max_size=cells))
        steps.append((axis, np.array(flat).reshape(wanted)))
        shape = [*shape[:axis], count, *shape[axis + 1 :]]
    return array, steps


@given(gathers())
def test_gathered_follows_numpy(case: tuple[np.ndarray, list[tuple[int, np.ndarray]]]) -> None:
    array, steps = case
    expected = array
    for axis, index in steps:
        if index.ndim == 1:
            expected = np.take(expected, index, axis)
        else:
            full = [n if a != axis else index.shape[axis] for a, n in enumerate(expected.shape)]
            expected = np.take_along_axis(expected, np.broadcast_to(index, full), axis)
    weight = GatheredWeight(ArrayWeight("w", array), steps)
    assert weight.shape == expected.shape
    assert np.array_equal(weight.read(), expected)
    assert bytes(weight.stored()) == expected.tobytes()
    assert weight.nbytes == expected.nbytes


def test_a_contiguous_gather_is_a_view() -> None:
    base = ArrayWeight("w", np.arange(12.0).reshape(3, 4))
    assert np.shares_memory(GatheredWeight(base, [(1, np.array([1, 2]))]).read(), base.read())
    assert not np.shares_memory(GatheredWeight(base, [(1, np.array([2, 1]))]).read(), base.read())
    # ends that look like a run with something else between them
    assert GatheredWeight(base, [(1, np.array([0, 2, 2, 3]))]).read()[0].tolist() == [0, 2, 2, 3]


def test_gathered_packed_and_text() -> None:
    odd = GatheredWeight(ArrayWeight("w", np.arange(8).astype(ml_dtypes.int4)), [(0, np.array([7, 3, 1]))])
    assert odd.nbytes == 2 and np.array_equal(TensorWeight(to_proto(odd)).read().astype(int), [7, 3, 1])
    text = GatheredWeight(ArrayWeight("t", np.array(["a", "bé", "c"])), [(0, np.array([1]))])
    assert text.nbytes == 3 and to_proto(text).string_data == ["bé".encode()]


@pytest.mark.parametrize("kind", ["f4", "f8", "i8", "bfloat16"])
@pytest.mark.parametrize("odd", [0, 1, 3])
def test_data_at_odd_addresses(kind: str, odd: int) -> None:
    """A model's bytes hold weights anywhere: values are the same, and what is made of them lies where types want it."""
    dtype = np.dtype(getattr(ml_dtypes, kind) if kind == "bfloat16" else kind)
    array = sample((4, 3, 5), dtype)
    store = np.zeros(array.nbytes + odd, np.uint8)
    store[odd:] = array.reshape(-1).view(np.uint8)
    base = BufferWeight("w", ArrayWeight("w", array).onnx_type, array.shape, store.data[odd:])
    assert base.read().flags.aligned == (odd == 0)
    assert np.array_equal(align_array(base.read()), array) and align_array(base.read()).flags.aligned
    assert np.shares_memory(align_array(base.read()), store) == (odd == 0)
    steps = [(1, np.array([0, 2])), (2, np.array([[[4, 0]], [[1, 2]], [[0, 1]], [[3, 4]]]))]
    taken = GatheredWeight(base, steps).read()
    assert taken.dtype == dtype and taken.flags.aligned
    assert np.array_equal(taken, np.take_along_axis(array[:, [0, 2]], steps[1][1], axis=2))
    run = GatheredWeight(base, [(0, np.array([1, 2]))]).read()
    assert np.array_equal(run, array[1:3]) and np.shares_memory(run, store)


@pytest.mark.parametrize(
    "step",
    [
        (2, np.array([0])),
        (-1, np.array([0])),
        (0, np.array([3])),
        (0, np.array([-1])),
        (0, np.array([0.0])),
        (0, np.zeros((2, 3), int)),
        (0, np.zeros((2, 1, 1), int)),
    ],
    ids=str,
)
def test_gathered_refuses_a_step_that_does_not_fit(step: tuple[int, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"^w: "):
        GatheredWeight(ArrayWeight("w", np.zeros((3, 2))), [step])


def test_file_weight_says_what_is_missing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with pytest.raises(ModelError, match=r"cannot read .*data.*16 bytes are needed"):
        FileWeight("w", TensorProto.FLOAT, [3], data, 4, 12)
    data.write_bytes(bytes(15))
    with pytest.raises(ModelError, match="data' is too short for tensor 'w': 16 bytes are needed, 15 are present"):
        FileWeight("w", TensorProto.FLOAT, [3], data, 4, 12)
    data.write_bytes(bytes(16))
    weight = FileWeight("w", TensorProto.FLOAT, [3], data, 4, 12)
    data.write_bytes(bytes(10))
    with pytest.raises(ModelError, match="16 bytes are needed, 10 are present"):
        weight.read()
    data.write_bytes(bytes(17))
    with pytest.raises(ModelError, match="has changed"):
        weight.read()
    data.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        weight.read()


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (TensorProto(name="w", data_type=1, dims=[2], raw_data=bytes(7)), "needs 8 bytes of data, its data have 7"),
        (TensorProto(name="w", data_type=1, dims=[2], float_data=[1]), "needs 2 values in float_data, it has 1"),
        (TensorProto(name="w", data_type=1, dims=[2]), "needs 2 values in float_data, it has 0"),
        (TensorProto(name="w", data_type=22, dims=[3], raw_data=bytes(3)), "needs 2 bytes"),
        (TensorProto(name="w", data_type=99, dims=[0]), "unknown element type 99"),
        (TensorProto(name="w", data_type=1, dims=[-1]), "impossible shape"),
        (TensorProto(name="w", data_type=1, dims=[0, 2**62]), "impossible shape"),
        (TensorProto(name="w", data_type=1, segment=TensorProto.Segment(begin=0)), "segments"),
        (TensorProto(name="w", data_type=1, data_location=1), "outside the model"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_damaged_tensors_are_named(proto: TensorProto, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        TensorWeight(proto)
    assert "'w'" in caught.value.message


def test_text_that_is_not_text() -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        TensorWeight(TensorProto(name="w", data_type=8, dims=[1], string_data=[b"\xff"])).read()
    with pytest.raises(ModelError, match="is text"):
        BufferWeight("w", TensorProto.STRING, [1], bytes(8))
    with pytest.raises(ModelError, match="no element type for the dtype datetime64"):
        ArrayWeight("w", np.zeros(1, "datetime64[s]"))


def test_constants() -> None:
    tensor = numpy_helper.from_array(np.eye(2, dtype=np.float16), "other")
    cases = {
        "value": (tensor, np.eye(2, dtype=np.float16)),
        "value_float": (1.5, np.float32(1.5)),
        "value_floats": ([1.5, 2.0], np.array([1.5, 2.0], np.float32)),
        "value_int": (7, np.int64(7)),
        "value_ints": ([7, 8], np.array([7, 8])),
        "value_string": ("é", np.array("é", object)),
        "value_strings": (["a", "b"], np.array(["a", "b"], object)),
    }
    for name, (given_, expected) in cases.items():
        weight = weight_from_constant(helper.make_node("Constant", [], ["c"], **{name: given_}))
        assert weight is not None and weight.name == "c"
        assert weight.dtype == expected.dtype and weight.shape == expected.shape
        assert np.array_equal(weight.read(), expected)
    assert weight_from_constant(helper.make_node("Relu", ["x"], ["c"])) is None
    assert weight_from_constant(helper.make_node("Constant", [], ["c"], domain="other", value_int=1)) is None
