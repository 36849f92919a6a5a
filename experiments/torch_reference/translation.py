"""The cases of the translators, which are in bahdanau.py and luong.py."""

from typing import Any

import numpy as np

from experiments.torch_reference.bahdanau import BahdanauTranslator
from experiments.torch_reference.cases import Case, Inputs, cases_of, ids
from experiments.torch_reference.luong import LuongTranslator


def cases() -> list[Case]:
    """Every case of the translators."""
    model: dict[str, Any] = {
        "source_vocabulary": 13,
        "target_vocabulary": 17,
        "embedding_features": 5,
        "hidden_features": 7,
    }
    deep, reverse = model | {"num_layers": 2}, model | {"reverse_source": True}
    plain, prediction = model | {"attention": False}, {"feed": "prediction"}
    tokens: Inputs = {
        "source": ids([3, 1, 12, 4, 0, 0], [7, 7, 2, 9, 11, 5], [1, 0, 0, 0, 0, 0]),
        "target_in": ids([1, 16, 2, 9], [1, 5, 5, 11], [1, 8, 0, 0]),
    }
    padded: Inputs = tokens | {"lengths": np.array([4, 6, 1])}
    return [
        *cases_of(
            "translation/bahdanau",
            BahdanauTranslator,
            bahdanau=(deep, tokens),
            bahdanau_lengths=(deep, padded),
        ),
        *cases_of(
            "translation/luong",
            LuongTranslator,
            luong=(model, tokens),
            luong_lengths=(model, padded),
            luong_reversed=(reverse, tokens),
            luong_reversed_lengths=(reverse, padded),
            luong_prediction=(model | prediction, padded),
            luong_no_attention=(plain, padded),
            luong_no_attention_prediction=(plain | prediction, padded),
        ),
    ]
