"""The Transformer's layers and stacks, as `torch.nn` names their weights."""

from collections.abc import Iterable

from jattn import nn
from jattn.interop.rules import Rearrange, Rule, Tied, within
from jattn.interop.torch.layers import EMBEDDING, LINEAR, NORM
from jattn.interop.torch.multi_head import PACKED, WIDTHS
from jattn.interop.torch.table import Table
from jattn.models import feature_encoder, transformer

MLP = (*within(LINEAR, "linear1", "linear1"), *within(LINEAR, "linear2", "linear2"))
_TOKEN = Rearrange("1 1 e -> e")


def multihead_attention(projections: Iterable[Rule]) -> tuple[Rule, ...]:
    """`torch.nn.MultiheadAttention`, learned tokens and all."""
    return (
        *within(projections, "", "attention"),
        Rule("bias_k", "bias_k", _TOKEN),
        Rule("bias_v", "bias_v", _TOKEN),
    )


ENCODER_LAYER = (
    *within(PACKED, "self_attn", "self_attention"),
    *within(MLP, "", "mlp"),
    *within(NORM, "norm1", "norm1"),
    *within(NORM, "norm2", "norm2"),
)
DECODER_LAYER = (
    *ENCODER_LAYER,
    *within(PACKED, "multihead_attn", "cross_attention"),
    *within(NORM, "norm3", "norm3"),
)


def _stack(layer: Iterable[Rule]) -> tuple[Rule, ...]:
    return (*within(layer, "layers.{layer}", "layers.{layer}"), *within(NORM, "norm", "norm"))


ENCODER, DECODER = _stack(ENCODER_LAYER), _stack(DECODER_LAYER)
TRANSFORMER = (*within(ENCODER, "encoder", "encoder"), *within(DECODER, "decoder", "decoder"))
FEATURES = (*within(LINEAR, "embedding", "embedding"), *within(ENCODER, "encoder", "stack"))
CLASSIFIER = (*within(FEATURES, "", "encoder"), *within(LINEAR, "fc", "out"))
READER = (
    *within(EMBEDDING, "src_tok_emb.embedding", "embedding"),
    *within(ENCODER, "transformer.encoder", "stack"),
)
WRITER = (
    *within(EMBEDDING, "tgt_tok_emb.embedding", "embedding"),
    *within(DECODER, "transformer.decoder", "stack"),
    *within(LINEAR, "generator", "out"),
)
# A Linear for the logits that shares the table of embeddings stands in a state dict beside it
TIED_WRITER = (
    Rule(("tgt_tok_emb.embedding.weight", "generator.weight"), "embedding.embedding", Tied(2)),
    *within(DECODER, "transformer.decoder", "stack"),
)


def _translator(writer: Iterable[Rule]) -> Table:
    rules = (*within(READER, "", "encoder"), *within(writer, "", "decoder"))
    return Table("src_tok_emb, tgt_tok_emb, transformer, generator", rules)


TABLES = {
    nn.TorchMultiheadAttention: (
        Table("torch.nn.MultiheadAttention", multihead_attention(PACKED)),
        Table("torch.nn.MultiheadAttention", multihead_attention(WIDTHS)),
    ),
    nn.FeedForward: (Table("linear1, linear2", MLP),),
    nn.TransformerEncoderLayer: (Table("torch.nn.TransformerEncoderLayer", ENCODER_LAYER),),
    nn.TransformerDecoderLayer: (Table("torch.nn.TransformerDecoderLayer", DECODER_LAYER),),
    nn.TransformerEncoder: (Table("torch.nn.TransformerEncoder", ENCODER),),
    nn.TransformerDecoder: (Table("torch.nn.TransformerDecoder", DECODER),),
    nn.Transformer: (Table("torch.nn.Transformer", TRANSFORMER),),
    feature_encoder.FeatureEncoder: (Table("embedding, encoder", FEATURES),),
    feature_encoder.FeatureClassifier: (Table("embedding, encoder, fc", CLASSIFIER),),
    transformer.Encoder: (Table("src_tok_emb, transformer.encoder", READER),),
    transformer.Decoder: tuple(
        Table("tgt_tok_emb, transformer.decoder, generator", rules)
        for rules in (TIED_WRITER, WRITER)
    ),
    transformer.TransformerTranslator: tuple(map(_translator, (TIED_WRITER, WRITER))),
}
