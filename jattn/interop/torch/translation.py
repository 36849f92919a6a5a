"""Translators: Bahdanau's in its usual PyTorch names, Luong's in the letters of its equations."""

from jattn.interop.rules import Rule, within
from jattn.interop.torch.layers import EMBEDDING, LINEAR
from jattn.interop.torch.pooling import ADDITIVE
from jattn.interop.torch.recurrent import CELL, NETWORK
from jattn.interop.torch.table import Table
from jattn.models import bahdanau, luong

BAHDANAU_ENCODER = (
    *within(EMBEDDING, "embedding", "embedding"),
    *within(NETWORK, "rnn", "gru"),
)
BAHDANAU_DECODER = (
    *within(ADDITIVE, "attention", "attention"),
    *within(EMBEDDING, "embedding", "embedding"),
    *within(NETWORK, "rnn", "gru"),
    *within(LINEAR, "dense", "out"),
)
LUONG_ENCODER = (
    *within(EMBEDDING, "embedding", "embedding"),
    *within(NETWORK, "rnn", "lstm"),
)
LUONG_DECODER = (
    *within(EMBEDDING, "embedding", "embedding"),
    *within(LINEAR, "h_projection", "first_h"),
    *within(LINEAR, "c_projection", "first_c"),
    *within(CELL, "rnn", "cell"),
    Rule("W.weight", "attention.weight"),
    *within(LINEAR, "W_u", "combine"),
    *within(LINEAR, "W_v", "out"),
)


def _both(encoder: tuple[Rule, ...], decoder: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (*within(encoder, "encoder", "encoder"), *within(decoder, "decoder", "decoder"))


TABLES = {
    bahdanau.Encoder: (Table("embedding, rnn", BAHDANAU_ENCODER),),
    bahdanau.Decoder: (Table("attention, embedding, rnn, dense", BAHDANAU_DECODER),),
    bahdanau.BahdanauTranslator: (
        Table("encoder, decoder", _both(BAHDANAU_ENCODER, BAHDANAU_DECODER)),
    ),
    luong.Encoder: (Table("embedding, rnn", LUONG_ENCODER),),
    luong.Decoder: (Table("embedding, h_projection … W_v", LUONG_DECODER),),
    luong.LuongTranslator: (Table("encoder, decoder", _both(LUONG_ENCODER, LUONG_DECODER)),),
}
