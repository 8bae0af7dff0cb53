"""Operators of onnx and of onnxruntime that knowingly have no rule, each with its reason.

An operator that is in neither the table of rules nor here is one that a newer release brought: it needs a rule, or a
line here. Their inputs keep all channels, which costs compression and nothing else.
"""

from __future__ import annotations

import onnx
import onnxruntime
import pytest

from onnxprune.rules import known

MS = "com.microsoft"
NEWEST = {"onnx": (1, 23), "onnxruntime": (1, 32)}
"""Releases up to which every operator was looked at."""

REASONS = {
    "has no floats with channels: it makes, reads or looks up text, images, maps or tokens": [
        *("ImageDecoder", "RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"),
        *("ai.onnx.ml:CastMap", "ai.onnx.ml:CategoryMapper", "ai.onnx.ml:ZipMap"),
        *("MurmurHash3", "NGramHashMapping", "NGramRepeatBlock", "Tokenizer", "VarlenNGramHashMapping"),
        *("BifurcationDetector", "SpeculativePrefixCommit", "WordConvEmbedding"),
    ],
    "makes numbers out of sizes or settings alone": [
        *("BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix", "Constant"),
    ],
    "draws random numbers that have no channels to follow": ["Multinomial", "RandomNormal", "RandomUniform"],
    "holds a body: it is laid open before rules are asked, or nothing inside is cut": [
        *("If", "Loop", "Scan", "SequenceMap", "ai.onnx.preview:FlexAttention"),
        *("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"),
    ],
    "holds a value of a type of its own": ["Optional", "OptionalGetElement", "OptionalHasElement"],
    "is of training": [
        *("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss", "ai.onnx.preview.training:Adagrad"),
        *("ai.onnx.preview.training:Adam", "ai.onnx.preview.training:Gradient", "ai.onnx.preview.training:Momentum"),
        *("BitmaskBiasDropout", "BitmaskDropout", "IsAllFinite", "MatMulNBitsQLoRA", "SampleOp"),
    ],
    "reads a signal without channels": ["STFT", "DynamicTimeWarping"],
    "stores weights in blocks of codes that run across rows, or are looked up by rows": [
        *("MatMulBnb4", "MatMulFpQ4", "MatMulPacked", "MatMulNBitsMlp", "MatMulNBitsQkv"),
        *("MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight", "GemmFloat8", "MoEPacked"),
        *("QuantizeBFP", "DequantizeBFP", "QEmbedLayerNormalization"),
    ],
    "is for other processors: no run here could prove a cut": [
        *("ComplexMul", "ComplexMulConj", "DecoderAttention", "DecoderMaskedSelfAttention", "DequantizeWithOrder"),
        *("DynamicSparseAttention", "GatedRelativePositionBias", "GatherPacked", "GemmaRotaryEmbedding", "Irfft"),
        *("LongformerAttention", "MRotaryEmbedding", "PackedSparseAttentionIndexer", "PagedAttention", "Rfft"),
        *("PackedSparseAttentionIndexerMerge", "QOrderedAttention", "QOrderedGelu", "QOrderedLayerNormalization"),
        *("QOrderedLongformerAttention", "QOrderedMatMul", "QuantizeWithOrder", "RMSNormRotary", "RemovePadding"),
        *("RestorePadding", "SparsePagedAttention", "SparseAttentionIndexer", "VarlenCausalConvWithState"),
        *("Mamba2Verify", "ConvStateReplay", "GatedDeltaNetStateReplay", "MoEGroupRouter", "RouterGateUpProj"),
    ],
    "computes on codes in a form that no converter writes": ["MulInteger", "QLinearReduceMean", "ReduceSumInteger"],
    "is a model compiled for a device": ["EPContext", "Snpe"],
    "attends within blocks or streams whose numbers of heads are settings of the whole model": [
        *("AttnLSTM", "EngramGate", "GatedDeltaNet", "HyperConnectionLowRankMix", "HyperConnectionPostMix"),
        *("HyperConnectionPreMix", "SparseAttention"),
    ],
    "holds a weight as a sparse tensor": ["SparseToDenseMatMul"],
}  # fmt: skip


def without() -> set[tuple[str, str]]:
    """(domain, operator) of all that is listed; names that stand alone are onnx's own, or else com.microsoft's."""
    own = {s.name for s in onnx.defs.get_all_schemas_with_history() if not s.domain}
    result = set()
    for name in (name for names in REASONS.values() for name in names):
        domain, _, kind = name.rpartition(":")
        result.add((domain or ("" if kind in own else MS), kind))
    return result


def release(module: object) -> tuple[int, ...]:
    return tuple(int(n) for n in str(getattr(module, "__version__", "0.0")).split(".")[:2])


def test_every_operator_of_onnx_has_a_rule_or_a_reason() -> None:
    if release(onnx) > NEWEST["onnx"]:
        pytest.skip("a newer onnx than was looked at")
    ours = {(s.domain, s.name) for s in onnx.defs.get_all_schemas_with_history()}
    assert not ours - set(known()) - without()


def test_every_operator_of_onnxruntime_has_a_rule_or_a_reason() -> None:
    module = onnxruntime.capi.onnxruntime_pybind11_state
    if release(onnxruntime) > NEWEST["onnxruntime"] or not hasattr(module, "get_all_operator_schema"):
        pytest.skip("a newer onnxruntime than was looked at, or one that does not list its operators")
    theirs = {(s.domain, s.name) for s in module.get_all_operator_schema() if s.domain == MS}
    assert not theirs - set(known()) - without()


def test_no_operator_with_a_rule_is_listed() -> None:
    assert not without() & set(known())


def test_no_operator_is_listed_twice() -> None:
    names = [name for names in REASONS.values() for name in names]
    assert len(names) == len(set(names))
