"""Every case that has a fixture.

Sizes are distinct primes where they can be, so that swapped axes cannot pass.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.torch_reference import (
    char_rnn,
    classification,
    luong,
    multi_head,
    pooling,
    positions,
    recurrent,
    self_attention,
    sequence_pooling,
)
from experiments.torch_reference.record import Case

B, T, S, H, V = 2, 5, 7, 3, 11
Inputs = dict[str, Any]
QUERY_KEY_VALUE: Inputs = {"query": (B, T, H), "key": (B, S, H), "value": (B, S, V)}
LENGTHS = np.array([3, 7])
LENGTHS_PER_QUERY = np.array([[3, 1, 7, 2, 5], [0, 4, 6, 7, 0]])


def ids(*lists: list[int]) -> np.ndarray:
    """Token or segment ids [B, T]."""
    return np.array(lists)


def some(*shape: int) -> np.ndarray:
    """A boolean mask in which about two entries of three are True."""
    return np.random.default_rng(0).random(shape) < 0.66


def pooling_cases() -> list[Case]:
    """Rows 1, 2, 3, 5, 6 and 7."""
    lengths: Inputs = {"lengths": LENGTHS}
    per_query: Inputs = {"lengths": LENGTHS_PER_QUERY}
    line: Inputs = {"query": (B, T, 1), "key": (B, S, 1), "value": (B, S, V)}
    samples = {"query": (B, T, H), "key": (B, T, H), "value": (B, T, V)}
    widths: Inputs = {"query": (B, T, 13), "key": (B, S, 17), "value": (B, S, V)}
    one_query: Inputs = QUERY_KEY_VALUE | {"query": (B, 1, H)}
    sizes: dict[str, Any] = {"query_features": 13, "key_features": 17}
    additive = sizes | {"hidden_features": 19, "dropout_rate": 0.5}
    product, bilinear = {"score": "dot_product"}, {"score": "bilinear", **sizes}
    average, kernel = pooling.AveragePooling, pooling.KernelRegression
    learned, scored = pooling.ParametricKernelRegression, pooling.scored_attention
    summed, scaled = pooling.AdditiveAttention, pooling.DotProductAttention
    return [
        Case(1, "average", average, {}, QUERY_KEY_VALUE),
        Case(1, "average_lengths", average, {}, QUERY_KEY_VALUE | lengths),
        Case(2, "kernel_regression", kernel, {}, line),
        Case(2, "kernel_regression_features", kernel, {}, QUERY_KEY_VALUE | lengths),
        Case(3, "parametric", learned, {}, line),
        Case(3, "parametric_leave_one_out", learned, {"leave_one_out": True}, samples),
        Case(5, "additive", summed, additive, widths),
        Case(5, "additive_lengths", summed, additive, widths | lengths),
        Case(5, "additive_lengths_per_query", summed, additive, widths | per_query),
        Case(6, "scaled_dot_product", scaled, {"dropout_rate": 0.5}, QUERY_KEY_VALUE),
        Case(6, "scaled_dot_product_lengths", scaled, {}, QUERY_KEY_VALUE | lengths),
        Case(6, "scaled_dot_product_lengths_per_query", scaled, {}, QUERY_KEY_VALUE | per_query),
        Case(7, "dot_product", scored, product, QUERY_KEY_VALUE),
        Case(7, "dot_product_one_query", scored, product, one_query),
        Case(7, "bilinear", scored, bilinear, widths),
        Case(7, "bilinear_lengths", scored, bilinear, widths | lengths),
        Case(7, "cosine", scored, {"score": "cosine"}, QUERY_KEY_VALUE | lengths),
    ]


def mask_cases() -> list[Case]:
    """Rows 4 and 8."""
    scores: Inputs = {"scores": (B, T, S)}
    with_empty_row = some(B, T, S)
    with_empty_row[1, 2] = False
    segments: Inputs = {
        "query_ids": ids([0, 0, 1, 1, 3], [2, 2, 1, 0, 0]),
        "key_ids": ids([0] * 3 + [1] * 4, [0, 1] * 3 + [2]),
    }
    lengths: Inputs = {"lengths": LENGTHS}
    per_query: Inputs = {"lengths": LENGTHS_PER_QUERY}
    kinds: list[tuple[str, dict[str, Any], Inputs]] = [
        ("padding", {"mask": "padding"}, lengths),
        ("padding_per_query", {"mask": "padding"}, per_query),
        ("causal", {"mask": "causal"}, {}),
        ("causal_offset", {"mask": "causal", "offset": 2}, {}),
        ("causal_offset_negative", {"mask": "causal", "offset": -2}, {}),
        ("sliding_window", {"mask": "sliding_window", "left": 2, "right": 1}, {}),
        ("no_self", {"mask": "no_self"}, {}),
        ("segments", {"mask": "segments"}, segments),
        ("prefix_lm", {"mask": "prefix_lm"}, lengths),
        ("causal_and_padding", {"mask": "causal & padding"}, lengths),
        ("algebra", {"mask": "~window | causal & ~no_self", "left": 1, "right": 2}, {}),
        ("dense", {"mask": "dense"}, {"dense": with_empty_row}),
    ]
    return [
        Case(4, "masked_softmax", pooling.MaskedSoftmax, {}, scores),
        Case(4, "masked_softmax_lengths", pooling.MaskedSoftmax, {}, scores | lengths),
        Case(4, "masked_softmax_lengths_per_query", pooling.MaskedSoftmax, {}, scores | per_query),
        Case(
            4, "masked_softmax_mask", pooling.MaskedSoftmax, {}, scores | {"mask": with_empty_row}
        ),
        *(
            Case(8, name, pooling.MaskedAttention, kind, QUERY_KEY_VALUE | more)
            for name, kind, more in kinds
        ),
    ]


def multi_head_cases() -> list[Case]:
    """Rows 9, 10, 15 and 16."""
    split, attention = multi_head.HeadSplit, multi_head.MultiHeadAttention
    widths = {"query_features": 13, "key_features": 17, "value_features": 19}
    separate: Inputs = {"query": (B, T, 13), "key": (B, S, 17), "value": (B, S, 19)}
    plain, bias = {"num_heads": 3, "features": 33}, {"use_bias": True}
    grouped = {"num_heads": 6, "features": 30, "num_kv_heads": 2}
    multi_query = {"num_heads": 5, "features": 35, "num_kv_heads": 1}
    lengths: Inputs = {"lengths": LENGTHS}
    per_query: Inputs = {"lengths": LENGTHS_PER_QUERY}
    return [
        Case(9, "heads", split, {"num_heads": 3}, {"x": (B, T, 33), **lengths}),
        Case(9, "heads_per_query", split, {"num_heads": 7}, {"x": (B, T, 35), **per_query}),
        Case(10, "self_attention", attention, plain | {"dropout_rate": 0.5}, {"query": (B, T, 33)}),
        Case(10, "widths", attention, plain | widths, separate),
        Case(10, "widths_bias_lengths", attention, plain | widths | bias, separate | lengths),
        Case(10, "widths_lengths_per_query", attention, plain | widths, separate | per_query),
        Case(15, "grouped_query", attention, grouped, {"query": (B, T, 30)}),
        Case(15, "grouped_query_bias", attention, grouped | widths | bias, separate | lengths),
        Case(16, "multi_query", attention, multi_query, {"query": (B, T, 35)}),
        Case(16, "multi_query_bias", attention, multi_query | widths | bias, separate | per_query),
    ]


def self_attention_cases() -> list[Case]:
    """Rows 12, 13, 14 and 18."""
    wide, shared = self_attention.WideHeads, self_attention.SharedProjectionAttention
    single, residual = self_attention.SelfAttention, self_attention.ResidualAttention
    heads = {"num_heads": 3, "in_features": 13, "head_features": 11}
    slices, one = {"num_heads": 3, "features": 33}, {"in_features": 13, "features": 11}
    same, other = ({"in_features": 13, "out_features": width} for width in (13, 11))
    norm = {"use_layer_norm": True}
    query: Inputs = {"query": (B, T, 13)}
    x: Inputs = {"x": (B, T, 13)}
    sliced: Inputs = {"x": (B, T, 33)}
    lengths: Inputs = {"lengths": np.array([3, 5])}
    per_query: Inputs = {"lengths": np.minimum(LENGTHS_PER_QUERY, T)}
    return [
        Case(12, "wide_heads", wide, heads, query),
        Case(12, "wide_heads_bias_lengths", wide, heads | {"use_bias": True}, query | lengths),
        Case(12, "wide_heads_key", wide, heads, query | {"key": (B, S, 13), "lengths": LENGTHS}),
        Case(13, "shared_projection", shared, slices, sliced),
        Case(13, "shared_projection_lengths", shared, slices, sliced | per_query),
        Case(13, "shared_projection_scale", shared, slices | {"scale": 33**-0.5}, sliced | lengths),
        Case(14, "single_head", single, one, x),
        Case(14, "single_head_lengths", single, one, x | lengths),
        Case(14, "single_head_no_bias", single, one | {"use_bias": False}, x | per_query),
        Case(18, "residual", residual, same, x | lengths),
        Case(18, "residual_norm", residual, same | norm, x),
        Case(18, "residual_widths", residual, other, x),
        Case(18, "residual_widths_norm_lengths", residual, other | norm, x | lengths),
    ]


def position_cases() -> list[Case]:
    """Rows 19, 20 and 21."""
    sinusoidal, rotation, learned = (
        positions.SinusoidalPositions,
        positions.RelativeRotation,
        positions.LearnedPositions,
    )
    where: Inputs = {"x": (B, T, 14), "positions": np.array([0, 1, 5, 100, 4095])}
    return [
        Case(
            19, "sinusoidal", sinusoidal, {"features": 14, "dropout_rate": 0.5}, {"x": (B, T, 14)}
        ),
        Case(19, "sinusoidal_long", sinusoidal, {"features": 6}, {"x": (1, 257, 6)}),
        Case(20, "rotation", rotation, {"features": 14, "offset": 3}, where),
        Case(20, "rotation_back", rotation, {"features": 14, "offset": -101}, where),
        Case(21, "learned", learned, {"max_length": T, "features": 13}, {"x": (B, T, 13)}),
        Case(21, "learned_shorter", learned, {"max_length": 11, "features": 13}, {"x": (B, T, 13)}),
    ]


def sequence_pooling_cases() -> list[Case]:
    """Rows 27, 28 and 29."""
    x: Inputs = {"x": (3, 7, 5)}
    lengths: Inputs = {"lengths": np.array([4, 7, 0])}
    kinds: list[tuple[int, str, Callable[..., Any], dict[str, Any]]] = [
        (27, "feature_pooling", sequence_pooling.FeaturePooling, {"features": 5}),
        (28, "multi_hop", sequence_pooling.MultiHopPooling, {"features": 5, "num_hops": 2}),
        (
            29,
            "learned_query",
            sequence_pooling.LearnedQueryPooling,
            {"features": 5, "hidden_features": 11},
        ),
    ]
    return [
        Case(row, f"{name}{suffix}", reference, arguments | more, inputs)
        for row, name, reference, arguments in kinds
        for suffix, more, inputs in (
            ("", {}, x),
            ("_lengths", {}, x | lengths),
            ("_no_bias", {"use_bias": False}, x | lengths),
        )
    ]


def recurrent_case(name: str, kind: str, arguments: dict[str, Any], inputs: Inputs) -> Case:
    """A case of row 24."""
    return Case(24, name, recurrent.recurrent, {"kind": kind, **arguments}, inputs)


def recurrent_cases() -> list[Case]:
    """Row 24: each network alone, two-way over padding, and without biases; each cell."""
    x: Inputs = {"x": (3, 11, 5)}
    padded: Inputs = x | {"lengths": np.array([4, 11, 1])}
    one = {"in_features": 5, "hidden_features": 7}
    two: dict[str, Any] = one | {"num_layers": 2, "bidirectional": True, "dropout_rate": 0.5}
    stack: dict[str, Any] = one | {"num_layers": 2, "dropout_rate": 0.5}
    relu, proj = {"activation": "relu"}, {"proj_features": 2}
    pair: Inputs = {"state": (4, 3, 2), "cell": (4, 3, 7)}
    cases = [
        recurrent_case("gru_two_layers", "GRU", stack, x | {"state": (2, 3, 7)}),
        recurrent_case("gru_lengths_state", "GRU", stack, padded | {"state": (2, 3, 7)}),
        recurrent_case("lstm_proj", "LSTM", one | proj, x),
        recurrent_case("lstm_proj_two_ways", "LSTM", two | proj, padded | pair),
    ]
    networks: list[tuple[str, str, dict[str, Any]]] = [
        ("rnn", "RNN", {}),
        ("rnn_relu", "RNN", relu),
        ("lstm", "LSTM", {}),
        ("gru", "GRU", {}),
    ]
    for name, kind, own in networks:
        parts = ["state", "cell"] if kind == "LSTM" else ["state"]
        states: Inputs = {part: (4, 3, 7) for part in parts}
        step: Inputs = {"x": (3, 5)} | {part: (3, 7) for part in parts}
        cases += [
            recurrent_case(name, kind, one | own, x),
            recurrent_case(f"{name}_no_bias", kind, one | own | {"use_bias": False}, x),
            recurrent_case(f"{name}_two_ways", kind, two | own, padded | states),
            recurrent_case(f"{name}_cell", f"{kind}Cell", one | own, step),
        ]
    return cases


def embedding_cases() -> list[Case]:
    """Row 24: the embedding."""
    tokens: Inputs = {"tokens": ids([3, 1, 12, 4, 3, 2], [7, 7, 2, 9, 7, 5], [1, 0, 2, 2, 2, 11])}
    table = {"num_embeddings": 13, "features": 5}
    options: dict[str, dict[str, Any]] = {
        "embedding": {},
        "embedding_padding": {"padding_idx": 2},
        "embedding_padding_counted": {"padding_idx": -6, "scale_grad_by_freq": True},
        "embedding_max_norm": {"padding_idx": 0, "max_norm": 1.0},
        "embedding_max_norm_1": {"max_norm": 2.0, "norm_type": 1.0},
    }
    return [recurrent_case(name, "Embedding", table | own, tokens) for name, own in options.items()]


def classifier_cases() -> list[Case]:
    """Rows 26 and 30: classifiers by the last step, and by attention.

    The last step is that of one or both directions, or what popular code takes for it.
    """
    model = {"vocabulary": 13, "classes": 3, "embedding_features": 5, "hidden_features": 7}
    deep: dict[str, Any] = model | {"num_layers": 2, "bidirectional": True, "dropout_rate": 0.5}
    tokens: Inputs = {"tokens": ids([3, 1, 12, 4, 0, 0], [7, 7, 2, 9, 11, 5], [1, 0, 0, 0, 0, 0])}
    padded: Inputs = tokens | {"lengths": np.array([4, 6, 1])}
    feature, query = {"pooling": "FeaturePooling"}, {"pooling": "LearnedQueryPooling"}

    def case(row: int, name: str, arguments: dict[str, Any], inputs: Inputs) -> Case:
        return Case(row, name, classification.Classifier, arguments, inputs)

    return [
        case(26, "classifier", model | {"network": "RNN"}, tokens),
        case(26, "classifier_lengths", model | {"network": "RNN"}, padded),
        case(26, "classifier_gru_two_ways", deep | {"network": "GRU"}, padded),
        case(26, "classifier_lstm_last_step", deep | {"pooling": "LastStep"}, tokens),
        case(26, "classifier_lstm_last_step_lengths", deep | {"pooling": "LastStep"}, padded),
        case(30, "attention_feature", deep | feature, tokens),
        case(30, "attention_feature_lengths", deep | feature, padded),
        case(30, "attention_query", deep | query, tokens),
        case(30, "attention_query_lengths", deep | query | {"padding_idx": None}, padded),
    ]


def seq2seq_cases() -> list[Case]:
    """Row 31."""
    model = {
        "source_vocabulary": 13,
        "target_vocabulary": 17,
        "embedding_features": 5,
        "hidden_features": 7,
        "num_layers": 2,
    }
    tokens: Inputs = {
        "source": ids([3, 1, 12, 4, 0, 0], [7, 7, 2, 9, 11, 5], [1, 0, 0, 0, 0, 0]),
        "target_in": ids([1, 16, 2, 9], [1, 5, 5, 11], [1, 8, 0, 0]),
    }
    return [
        Case(31, "seq2seq", recurrent.BahdanauTranslator, model, tokens),
        Case(
            31,
            "seq2seq_lengths",
            recurrent.BahdanauTranslator,
            model,
            tokens | {"lengths": np.array([4, 6, 1])},
        ),
    ]


def char_rnn_cases() -> list[Case]:
    """Row 25: "hello" and another word."""
    tokens: Inputs = {"tokens": ids([1, 0, 2, 2, 3], [3, 3, 0, 1, 2])}
    sizes = {"vocabulary": 5, "embedding_features": 7, "hidden_features": 3, "num_layers": 2}
    return [
        Case(25, "cell", char_rnn.char_rnn, {"kind": "CharCell", "vocabulary": 5}, tokens),
        Case(25, "rnn", char_rnn.char_rnn, {"kind": "CharRNN", "vocabulary": 5}, tokens),
        Case(25, "embedding", char_rnn.char_rnn, {"kind": "EmbeddedCharRNN", **sizes}, tokens),
    ]


def luong_cases() -> list[Case]:
    """Row 32."""
    model = {
        "source_vocabulary": 13,
        "target_vocabulary": 17,
        "embedding_features": 5,
        "hidden_features": 7,
    }
    tokens: Inputs = {
        "source": ids([3, 1, 12, 4, 0, 0], [7, 7, 2, 9, 11, 5], [1, 0, 0, 0, 0, 0]),
        "target_in": ids([1, 16, 2, 9], [1, 5, 5, 11], [1, 8, 0, 0]),
    }
    padded: Inputs = tokens | {"lengths": np.array([4, 6, 1])}
    return [
        Case(32, "luong", luong.LuongTranslator, model, tokens),
        Case(32, "luong_lengths", luong.LuongTranslator, model, padded),
        Case(32, "luong_reversed", luong.LuongTranslator, model | {"reverse_source": True}, tokens),
        Case(
            32,
            "luong_reversed_lengths",
            luong.LuongTranslator,
            model | {"reverse_source": True},
            padded,
        ),
        Case(32, "luong_prediction", luong.LuongTranslator, model | {"feed": "prediction"}, padded),
        Case(32, "luong_no_attention", luong.LuongTranslator, model | {"attention": False}, padded),
        Case(
            32,
            "luong_no_attention_prediction",
            luong.LuongTranslator,
            model | {"attention": False, "feed": "prediction"},
            padded,
        ),
    ]


GROUPS: tuple[Callable[[], list[Case]], ...] = (
    pooling_cases,
    mask_cases,
    multi_head_cases,
    self_attention_cases,
    position_cases,
    sequence_pooling_cases,
    recurrent_cases,
    embedding_cases,
    classifier_cases,
    seq2seq_cases,
    char_rnn_cases,
    luong_cases,
)


def all_cases() -> list[Case]:
    """Every case, in the order of the rows."""
    return sorted(
        itertools.chain.from_iterable(group() for group in GROUPS), key=lambda case: case.file_name
    )
