"""A few real exported and trained models, where they lie beside the repository: cut exactly, or left with reasons."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

import onnxprune as op

SHARED = Path(__file__).resolve().parents[2] / "shared"
ZOO = [
    "custom_lenet_flatten__ts", "custom_se_conv_net__ts", "custom_resnext_group__ts", "custom_gcn_dense_adj__ts",
    "custom_einsum_weight_proj__dynamo", "custom_window_partition_attn__ts", "custom_pixelshuffle_sr_espcn__dynamo",
    "custom_tsm_roll_shift__ts",
]  # fmt: skip
TRAINED = ["mnist_cntk", "mlperf_kws_dscnn", "cifar10_mlperf_resnet8", "vnn_vit_pgd_2_3_16"]


def assert_cut_or_reasons(source: Any) -> None:
    try:
        result = op.prune(source, ratio=0.3, criterion="l2", latency=False)
    except op.BudgetError as error:
        assert error.hint
        return
    assert result.report.exactness is not None
    assert result.report.exactness.passed
    assert result.report.totals.params_after < result.report.totals.params_before


@pytest.mark.skipif(not (SHARED / "zoo" / "zoo.py").exists(), reason="the exported models are not here")
@pytest.mark.parametrize("name", ZOO)
def test_exported_models(name: str) -> None:
    spec = importlib.util.spec_from_file_location("zoo", SHARED / "zoo" / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    path = SHARED / "zoo" / f"{name}.onnx.gz"
    if not path.exists():
        pytest.skip("not among them")
    assert_cut_or_reasons(zoo.fill(path))


@pytest.mark.skipif(not (SHARED / "trained" / "models").exists(), reason="the trained models are not here")
@pytest.mark.parametrize("name", TRAINED)
def test_trained_models(name: str) -> None:
    path = SHARED / "trained" / "models" / f"{name}.onnx"
    if not path.exists():
        pytest.skip("not among them")
    assert_cut_or_reasons(path)
