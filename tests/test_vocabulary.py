"""A smaller vocabulary: exact on its own tokens, whatever reads the ids, and refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from onnx import numpy_helper

import onnxprune as op
from onnxprune.cli.main import main
from onnxprune.pruning import vocabulary as tables
from onnxprune.runtime.sessions import open_session, run

V, WIDTH, KEPT = 40, 8, (1, 3, 5, 6, 20, 39)


def embedded(net: Net, form: str, ids: str) -> tuple[str, str]:
    """Return the rows of a table at some ids, and the table as floats [V, WIDTH]."""
    if form == "float":
        table = net.weight(V, WIDTH, name="table")
        return net.op("Gather", table, ids), table
    if form == "coded rows":
        codes = net.const(np.random.default_rng(1).integers(-99, 99, (V, WIDTH)).astype(np.int8), np.int8, "table")
        scale = net.const(np.linspace(0.01, 0.02, V).astype(np.float32), np.float32)
        zero = net.const(np.zeros(V, np.int8), np.int8)
        table = net.op("DequantizeLinear", codes, scale, zero, axis=0)
        return net.op("Gather", table, ids), table
    codes = net.const(np.random.default_rng(1).integers(0, 255, (V, WIDTH * 2)).astype(np.uint8), np.uint8, "table")
    scales = net.weight(V, 2, name="scales")
    zeros = net.const(np.full((V, 1), 0x88, np.uint8), np.uint8)
    wide = net.op("GatherBlockQuantized", codes, ids, scales, zeros, domain="com.microsoft", bits=4, block_size=16)
    return net.op("MatMul", wide, net.weight(4 * WIDTH, WIDTH)), ""


def language(form: str = "float", tied: bool = True, tail: str = "") -> onnx.ModelProto:
    """Return an embedding, a layer, logits and a mask of padding (id 3), through a reshaped copy of the ids."""
    net = Net(17)
    ids = net.input("ids", ["B", "S"], np.int64)
    x, table = embedded(net, form, net.reshape(net.op("Identity", ids), 0, -1))
    x = net.op("Tanh", net.op("MatMul", x, net.weight(WIDTH, WIDTH, scale=1.0, name="layer")))
    head = net.op("Transpose", table, perm=[1, 0]) if tied and table else net.weight(WIDTH, V, name="head")
    y = net.op("Add", net.op("MatMul", x, head), net.weight(V, name="bias"))
    pad = net.op("Cast", net.op("Equal", ids, net.const(np.array(3, np.int64))), to=1)
    y = net.op("Add", y, net.unsqueeze(pad, [2]))
    y = net.op(tail, y) if tail else y
    return net.model(y, shapes={y: ["B", "S", V]})


def outputs(model: onnx.ModelProto, ids: Any) -> np.ndarray:
    return next(iter(run(open_session(model.SerializeToString()), {"ids": np.asarray(ids, np.int64)}).values()))


@pytest.mark.parametrize("keep_ids", [False, True])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["float", "coded rows", "blocks"])
def test_logits_of_the_tokens_left_are_the_original_s(form: str, tied: bool, keep_ids: bool) -> None:
    model = language(form, tied)
    result = op.prune(model, vocabulary=KEPT, keep_ids=keep_ids)
    small, facts = result.model, result.report.vocabulary
    ids = np.random.default_rng(2).integers(0, len(KEPT), (3, 7))
    old = np.asarray(KEPT)[ids]
    np.testing.assert_allclose(outputs(small, old if keep_ids else ids), outputs(model, old)[..., KEPT], atol=1e-6)
    assert facts is not None and (facts.tokens_before, facts.tokens_after) == (V, len(KEPT))
    weights = {t.name: tuple(t.dims) for t in small.graph.initializer}
    assert weights["table"][0] == len(KEPT) and weights["bias"] == (len(KEPT),)
    assert facts.bytes_saved > 0 and len(result.report.exactness.batches) == 3
    assert op.prune(model, plan=op.Plan.from_dict(result.plan.to_dict())).model == small


def test_files(tmp_path: Path) -> None:
    onnx.save(language(), tmp_path / "model.onnx")
    (tmp_path / "tokens.txt").write_text("1 3,5\n20\n39 6\n")
    (tmp_path / "tokens.json").write_text(json.dumps({"a": 1, "b": 3, "c": 5, "d": 20, "e": 39, "f": 6}))
    for name in ("tokens.txt", "ids=tokens.json"):
        tokens = name.replace("tokens", str(tmp_path / "tokens"))
        op.prune(tmp_path / "model.onnx", vocabulary=tokens).save(tmp_path / "small.onnx", plan=tmp_path / "plan.json")
        data = json.loads((tmp_path / "small.onnx.vocabulary.json").read_text())
        assert data["old_id"] == list(KEPT) and data["new_id"]["20"] == 4
    again = op.prune(tmp_path / "model.onnx", plan=tmp_path / "plan.json").model
    assert again == onnx.load(tmp_path / "small.onnx")


def test_the_command_writes_the_map(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx.save(language(), tmp_path / "model.onnx")
    (tmp_path / "tokens.txt").write_text("1 3 5 6 20 39")
    command = [
        str(tmp_path / "model.onnx"),
        "--vocabulary",
        str(tmp_path / "tokens.txt"),
        "-o",
        str(tmp_path / "o.onnx"),
    ]
    main.main(command, standalone_mode=False)
    shown = "".join(capfd.readouterr())
    assert "40 to 6" in shown and "o.onnx.vocabulary.json" in shown
    assert (tmp_path / "o.onnx.vocabulary.json").is_file()


def test_auto_and_channels_in_one_run(tmp_path: Path) -> None:
    data = {"ids": np.random.default_rng(0).integers(0, 20, (40, 6))}
    (tmp_path / "config.json").write_text('{"eos_token_id": [30, 31], "pad_token_id": 0, "bos_token_id": null}')
    result = op.prune(language(), vocabulary="auto", tokenizer=tmp_path, data=data, ratio=0.5, latency=False)
    facts, totals = result.report.vocabulary, result.report.totals
    assert facts is not None and facts.tokens_after == 22 and result.plan.groups
    assert facts.special == {"eos_token_id": [30, 31], "pad_token_id": [0]}
    assert totals.params_before > 2 * totals.params_after and result.report.fidelity is not None
    shapes = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    assert shapes["table"] == (22, WIDTH // 2) and shapes["bias"] == (22,)
    assert op.prune(language(), plan=result.plan, latency=False).report.totals.params_after == totals.params_after


def test_removed_tokens_become_the_unknown_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"unk_token_id": 5}')
    model = op.prune(language(), vocabulary=KEPT, keep_ids=True, tokenizer=tmp_path / "config.json").model
    np.testing.assert_array_equal(outputs(model, [[0, 2, 3]]), outputs(model, [[5, 5, 3]]))


def test_a_table_beside_logits_that_stay() -> None:
    result = op.prune(language(tied=False, tail="Softmax"), vocabulary=KEPT)
    facts = result.report.vocabulary
    assert facts is not None and not facts.outputs and "Softmax" in next(iter(facts.reasons.values()))
    old = np.asarray(KEPT)[None]
    small = outputs(result.model, np.arange(len(KEPT))[None])
    np.testing.assert_allclose(small, outputs(language(tied=False, tail="Softmax"), old), atol=1e-6)


def test_the_proof_sees_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    true = tables.renumbered

    def wrong(parts: Any, found: Any, facts: Any, kept: Any, names: Any) -> Any:
        return true(parts, found, facts, np.roll(kept, 1), names)

    monkeypatch.setattr("onnxprune.passes.vocabulary.renumbered", wrong)
    with pytest.raises(op.ValidationError, match="fewer tokens is not exact"):
        op.prune(language(), vocabulary=KEPT)


def floats() -> onnx.ModelProto:
    net = Net(17)
    return net.model(net.op("MatMul", net.input("x", ["B", 4]), net.weight(4, 4)))


def unread() -> onnx.ModelProto:
    net = Net(17)
    x = net.op("Cast", net.input("ids", ["B", 4], np.int64), to=1)
    return net.model(net.op("MatMul", x, net.weight(4, 4)))


def twins() -> onnx.ModelProto:
    net = Net(17)
    a, b = (net.op("Gather", net.weight(V, 4), net.input(n, ["B", 3], np.int64)) for n in ("first", "second"))
    return net.model(net.op("Add", a, b))


@pytest.mark.parametrize(
    ("model", "tokens", "message"),
    [
        (language, [], "holds no tokens"),
        (language, [1, 2, V], r"out of range: 40 \(the model has 40 tokens, 0 to 39\)"),
        (language, [-1, 2], "out of range: -1"),
        (language, ["hello"], "'hello', which is no token id"),
        (language, [7], "single token"),
        (language, "nothing.txt", "cannot be read: No such file"),
        (language, "auto", "data, which is not given"),
        (language, {"idz": KEPT}, "no input 'idz'"),
        (floats, KEPT, "No embedding was found: no input holds ids, but 'x'"),
        (floats, {"x": KEPT}, "input 'x' does not hold ids"),
        (unread, KEPT, "'ids' pick no rows of a table"),
        (twins, KEPT, "several inputs look up tables of 40 rows each: first, second"),
        (lambda: language(tail="Softmax"), KEPT, "rows of 'table' keep their size: .*Softmax"),
    ],
)
def test_refused(model: Callable[[], onnx.ModelProto], tokens: Any, message: str) -> None:
    with pytest.raises(op.OnnxpruneError, match=message) as caught:
        op.prune(model(), vocabulary=tokens)
    assert caught.value.exit_code in (2, 5)


def test_refused_with_data_and_configurations(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"text_config": {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}}')
    with pytest.raises(op.UsageError, match=r"drops special tokens: eos_token_id \(2\), pad_token_id \(0\)"):
        op.prune(language(), vocabulary=KEPT, tokenizer=tmp_path)
    config.write_text('{"vocab_size": 50000, "bos_token_id": 1}')
    with pytest.raises(op.UsageError, match="is of another model: it has 50,000 tokens, and this one 40"):
        op.prune(language(), vocabulary=KEPT, tokenizer=config)
    config.write_text('{"added_tokens": [{"id": 2, "content": "</s>", "special": true}, {"id": 4, "content": "x"}]}')
    with pytest.raises(op.UsageError, match=r"drops special tokens: </s> \(2\)\n"):
        op.prune(language(), vocabulary=KEPT, tokenizer=config)
    config.write_text("{}")
    with pytest.raises(op.UsageError, match="names no special tokens"):
        op.prune(language(), vocabulary=KEPT, tokenizer=config)
    with pytest.raises(op.UsageError, match="'ids' holds 2 tokens that vocabulary drops: 0, 2"):
        op.prune(language(), vocabulary=KEPT, data={"ids": np.array([[0, 1, 2], [3, 3, 3]])}, ratio=0.5)
    with pytest.raises(op.UsageError, match="holds no numbers"):
        op.prune(language(), vocabulary="auto", data={"ids": np.zeros((4, 0), np.int64)})
    with pytest.raises(op.UsageError, match="keep_ids is about the ids of a smaller vocabulary"):
        op.prune(language(), keep_ids=True)


def test_the_weights_are_those_of_the_tokens() -> None:
    model = language()
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer}
        for m in (model, op.prune(model, vocabulary=KEPT).model)
    )
    np.testing.assert_array_equal(after["table"], before["table"][list(KEPT)])
