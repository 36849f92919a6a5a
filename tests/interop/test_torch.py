"""Every module with weights has a table, in which they travel to PyTorch's names and back."""

import importlib
import inspect
import itertools
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import models, nn
from jattn.interop import ConversionError, Rule, load_torch, to_torch, torch_rules
from jattn.interop.convert import TABLES
from jattn.models import (
    bahdanau,
    bert,
    causal_lm,
    char_rnn,
    classifier,
    encoder_decoder,
    feature_encoder,
    luong,
    transformer,
)
from jattn.nn import recurrent_cells

RNGS = nnx.Rngs(0)
TRANSLATION = (11, 13, 3, 5)
FEATURES = (3, 6, 2, 2, 5)


def classifier_of(**options):
    return models.Classifier(classifier.Config(11, 3, 5, 7, **options), rngs=RNGS)


def causal_lm_of(**options):
    return causal_lm.Config(11, 6, 2, 2, 1, 4, 5, **options)


def bert_of(**options):
    return bert.Config(11, 6, 2, 2, 5, **options)


def transformer_of(**options):
    return transformer.Config(11, 13, 6, 2, 1, 2, 5, **options)


MODULES = {
    nnx.Linear: [lambda: nnx.Linear(3, 5, rngs=RNGS)],
    nnx.Embed: [lambda: nnx.Embed(3, 5, rngs=RNGS)],
    nnx.LayerNorm: [lambda: nnx.LayerNorm(3, rngs=RNGS)],
    nn.RMSNorm: [lambda: nn.RMSNorm(3, rngs=RNGS)],
    nn.AttentionSink: [lambda: nn.AttentionSink(3, rngs=RNGS)],
    nn.GatedFeedForward: [
        lambda: nn.GatedFeedForward(3, 5, rngs=RNGS),
        lambda: nn.GatedFeedForward(3, 5, use_bias=True, rngs=RNGS),
    ],
    nnx.RMSNorm: [lambda: nnx.RMSNorm(3, rngs=RNGS)],
    nn.Embedding: [lambda: nn.Embedding(3, 5, rngs=RNGS)],
    nn.LearnedPositions: [lambda: nn.LearnedPositions(3, 5, rngs=RNGS)],
    nn.RelativePositions: [lambda: nn.RelativePositions(3, 5, rngs=RNGS)],
    nn.NadarayaWatson: [lambda: nn.NadarayaWatson(rngs=RNGS)],
    nn.AdditiveAttention: [lambda: nn.AdditiveAttention(3, 5, 7, rngs=RNGS)],
    nn.BilinearAttention: [lambda: nn.BilinearAttention(3, 5, rngs=RNGS)],
    nn.MultiHeadAttention: [
        lambda: nn.MultiHeadAttention(3, 15, rngs=RNGS),
        lambda: nn.MultiHeadAttention(3, 15, normalize_qk=nnx.RMSNorm, rngs=RNGS),
    ],
    nnx.MultiHeadAttention: [
        lambda: nnx.MultiHeadAttention(3, 15, decode=False, rngs=RNGS),
        lambda: nnx.MultiHeadAttention(3, 15, 12, 7, use_bias=False, decode=False, rngs=RNGS),
    ],
    nn.SharedProjectionAttention: [lambda: nn.SharedProjectionAttention(3, 15, rngs=RNGS)],
    nn.SelfAttention: [lambda: nn.SelfAttention(3, 5, rngs=RNGS)],
    nn.ResidualAttention: [
        lambda: nn.ResidualAttention(
            nn.SelfAttention(3, 5, rngs=RNGS), 3, 5, use_layer_norm=True, rngs=RNGS
        ),
        lambda: nn.ResidualAttention(nn.MultiHeadAttention(3, 15, rngs=RNGS), 15, rngs=RNGS),
    ],
    nn.TorchMultiheadAttention: [
        lambda: nn.TorchMultiheadAttention(6, 2, add_bias_kv=True, rngs=RNGS),
        lambda: nn.TorchMultiheadAttention(6, 2, kdim=3, vdim=5, rngs=RNGS),
    ],
    nn.FeedForward: [lambda: nn.FeedForward(3, 5, rngs=RNGS)],
    nn.TransformerEncoderLayer: [lambda: nn.TransformerEncoderLayer(6, 2, 5, rngs=RNGS)],
    nn.TransformerDecoderLayer: [
        lambda: nn.TransformerDecoderLayer(6, 2, 5, use_bias=False, rngs=RNGS)
    ],
    nn.TransformerEncoder: [
        lambda: nn.TransformerEncoder([nn.TransformerEncoderLayer(6, 2, 5, rngs=RNGS)])
    ],
    nn.TransformerDecoder: [lambda: nn.Transformer(6, 2, 1, 2, 5, rngs=RNGS).decoder],
    nn.Transformer: [lambda: nn.Transformer(6, 2, 2, 1, 5, rngs=RNGS)],
    nn.FeaturePooling: [lambda: nn.FeaturePooling(3, rngs=RNGS)],
    nn.MultiHopPooling: [lambda: nn.MultiHopPooling(3, 2, rngs=RNGS)],
    nn.LearnedQueryPooling: [lambda: nn.LearnedQueryPooling(3, 5, rngs=RNGS)],
    nn.RNNCell: [lambda: nn.RNNCell(3, 5, rngs=RNGS)],
    nn.LSTMCell: [lambda: nn.LSTMCell(3, 5, rngs=RNGS)],
    nn.GRUCell: [lambda: nn.GRUCell(3, 5, rngs=RNGS)],
    nn.RNN: [lambda: nn.RNN(3, 5, num_layers=2, bidirectional=True, rngs=RNGS)],
    nn.LSTM: [lambda: nn.LSTM(3, 5, num_layers=2, proj_features=2, rngs=RNGS)],
    nn.GRU: [lambda: nn.GRU(3, 5, use_bias=False, rngs=RNGS)],
    models.CharCell: [lambda: models.CharCell(char_rnn.Config(5), rngs=RNGS)],
    models.CharRNN: [lambda: models.CharRNN(char_rnn.Config(5), rngs=RNGS)],
    models.EmbeddedCharRNN: [lambda: models.EmbeddedCharRNN(char_rnn.Config(5), rngs=RNGS)],
    models.Bert: [
        lambda: models.Bert(bert_of(), rngs=RNGS),
        lambda: models.Bert(bert_of(positions="relative_key"), pooler=False, rngs=RNGS),
    ],
    models.BertForPreTraining: [
        lambda: models.BertForPreTraining(bert_of(), rngs=RNGS),
        lambda: models.BertForPreTraining(bert_of(tied=False), rngs=RNGS),
    ],
    models.BertForMaskedLM: [lambda: models.BertForMaskedLM(bert_of(), rngs=RNGS)],
    models.BertForSequenceClassification: [
        lambda: models.BertForSequenceClassification(bert_of(classes=3), rngs=RNGS)
    ],
    models.BertForTokenClassification: [
        lambda: models.BertForTokenClassification(bert_of(classes=3), rngs=RNGS)
    ],
    bert.Block: [lambda: bert.Block(bert_of(), rngs=RNGS)],
    bert.WordHead: [
        lambda: bert.WordHead(bert_of(), rngs=RNGS),
        lambda: bert.WordHead(bert_of(tied=False), rngs=RNGS),
    ],
    models.Classifier: [
        lambda: classifier_of(network=nn.GRU),
        lambda: classifier_of(pooling=nn.FeaturePooling),
        lambda: classifier_of(pooling=nn.LearnedQueryPooling, bidirectional=True),
    ],
    bahdanau.Encoder: [lambda: bahdanau.Encoder(bahdanau.Config(*TRANSLATION), rngs=RNGS)],
    bahdanau.Decoder: [lambda: bahdanau.Decoder(bahdanau.Config(*TRANSLATION), rngs=RNGS)],
    models.BahdanauTranslator: [
        lambda: models.BahdanauTranslator(bahdanau.Config(*TRANSLATION, num_layers=2), rngs=RNGS)
    ],
    luong.Encoder: [lambda: luong.Encoder(luong.Config(*TRANSLATION), rngs=RNGS)],
    luong.Decoder: [lambda: luong.Decoder(luong.Config(*TRANSLATION), rngs=RNGS)],
    models.LuongTranslator: [
        lambda: models.LuongTranslator(luong.Config(*TRANSLATION), rngs=RNGS),
        lambda: models.LuongTranslator(luong.Config(*TRANSLATION, attention=False), rngs=RNGS),
    ],
    feature_encoder.FeatureEncoder: [
        lambda: feature_encoder.FeatureEncoder(feature_encoder.Config(*FEATURES), rngs=RNGS)
    ],
    feature_encoder.FeatureClassifier: [
        lambda: feature_encoder.FeatureClassifier(feature_encoder.Config(*FEATURES), 5, rngs=RNGS)
    ],
    transformer.Encoder: [lambda: transformer.Encoder(transformer_of(), rngs=RNGS)],
    transformer.Decoder: [
        lambda: transformer.Decoder(transformer_of(), rngs=RNGS),
        lambda: transformer.Decoder(transformer_of(tied=True), rngs=RNGS),
    ],
    causal_lm.Block: [lambda: causal_lm.Block(causal_lm_of(), rngs=RNGS)],
    models.CausalLM: [
        lambda: models.CausalLM(causal_lm_of(), rngs=RNGS),
        lambda: models.CausalLM(causal_lm_of(tied=True), rngs=RNGS),
        lambda: models.CausalLM(
            causal_lm_of(normalize_qk=True, qkv_bias=True, out_bias=True, mlp_bias=True), rngs=RNGS
        ),
    ],
    models.TransformerTranslator: [
        lambda: models.TransformerTranslator(transformer_of(), rngs=RNGS),
        lambda: models.TransformerTranslator(transformer_of(tied=True), rngs=RNGS),
    ],
}
EXAMPLES = [pytest.param(new, id=cls.__name__) for cls, news in MODULES.items() for new in news]
BASES = {recurrent_cells.Cell, encoder_decoder.Decoder, encoder_decoder.EncoderDecoder}
NO_WEIGHTS = {
    nn.DotProductAttention: lambda: nn.DotProductAttention(),
    nn.CosineAttention: lambda: nn.CosineAttention(),
    nn.SinusoidalPositions: lambda: nn.SinusoidalPositions(4),
    classifier.LastStep: lambda: classifier.LastStep(3, rngs=RNGS),
}


def test_every_module_of_jattn_is_here_and_has_a_table():
    defined = {
        cls
        for package in (nn, models)
        for file in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        for name, cls in inspect.getmembers(importlib.import_module(file.name), inspect.isclass)
        if cls.__module__ == file.name and issubclass(cls, nnx.Module) and name[0] != "_"
    }
    ours = {cls for cls in MODULES if cls.__module__.startswith("jattn")}
    assert defined - BASES == ours | set(NO_WEIGHTS)
    assert set(TABLES) == set(MODULES)


def distinct(module):
    """Weights under PyTorch's names that no two parameters share."""
    counter = itertools.count()

    def numbered(leaf):
        return jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) + 1000 * next(counter)

    module = nnx.clone(module)
    nnx.update(module, jax.tree.map(numbered, nnx.state(module, nnx.Param)))
    return to_torch(module)


@pytest.mark.parametrize("new", EXAMPLES)
def test_weights_travel_there_and_back_bit_for_bit(new):
    module = new()
    tensors = distinct(module)
    load_torch(module, tensors)
    back = to_torch(module)
    assert back.keys() == tensors.keys() and tensors
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("new", NO_WEIGHTS.values(), ids=[cls.__name__ for cls in NO_WEIGHTS])
def test_a_module_without_weights_needs_no_table(new):
    module = new()
    load_torch(module, {})
    assert to_torch(module) == {}
    with pytest.raises(ConversionError, match="unused: weight"):
        load_torch(module, {"weight": np.ones(2)})


def test_a_derived_class_has_the_table_of_its_base():
    class Mine(nn.MultiHeadAttention):
        pass

    module = Mine(3, 15, rngs=RNGS)
    load_torch(module, distinct(module))
    assert torch_rules(Mine) == torch_rules(nn.MultiHeadAttention)


class Unknown(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(2))


def test_a_class_without_a_table_needs_rules():
    for request in (
        lambda: load_torch(Unknown(), {"s": np.ones(2)}),
        lambda: to_torch(Unknown()),
        lambda: torch_rules(Unknown),
    ):
        with pytest.raises(TypeError, match=r"Unknown has no table of .*: pass rules"):
            request()
    rules, module = [Rule("s", "scale")], Unknown()
    load_torch(module, {"s": np.full(2, 3, np.float32)}, rules)
    np.testing.assert_array_equal(to_torch(module, rules)["s"], [3, 3])
    with pytest.raises(TypeError, match=r"expected a flax.nnx.Module, got State"):
        to_torch(nnx.state(module))


# The names of the tensors tell the table


def multi_head(biases="qkvo", **options):
    """With biases on those of its four projections alone."""
    module = nn.MultiHeadAttention(3, 15, use_bias=True, rngs=RNGS, **options)
    for name in ("query", "key", "value", "out"):
        if name[0] not in biases:
            linear = getattr(module, name)
            bare = nnx.Linear(linear.in_features, linear.out_features, use_bias=False, rngs=RNGS)
            setattr(module, name, bare)
    return module


def flax_attention(width, heads=3, **options):
    return nnx.MultiHeadAttention(heads, 15, in_kv_features=width, decode=False, **options)


@pytest.mark.parametrize(("width", "tensors"), [
    (15, {"in_proj_weight": (45, 15)}),
    (7, {"q_proj_weight": (15, 15), "k_proj_weight": (15, 7), "v_proj_weight": (15, 7)}),
])  # fmt: skip
def test_the_heads_of_flax_are_apart(width, tensors):
    """N is that of the module; PyTorch packs the rows of query, key, value, each of all heads."""
    module, other = flax_attention(width, rngs=RNGS), flax_attention(width, rngs=nnx.Rngs(1))
    load_torch(module, distinct(module))
    found = to_torch(module)
    assert {name: found[name].shape for name in tensors} == tensors
    assert found["in_proj_bias"].shape == (45,) and found["out_proj.weight"].shape == (15, 15)
    if width == 15:
        rows = found["in_proj_weight"].reshape(3, 3, 5, 15)  # part, n, h, i
        np.testing.assert_array_equal(rows[1, 2, 4], module.key.kernel[:, 2, 4])
    np.testing.assert_array_equal(found["out_proj.weight"][6, 7], module.out.kernel[1, 2, 6])
    load_torch(other, found)
    same(module, other)


def test_heads_of_flax_that_do_not_fit_are_told():
    module = flax_attention(15, rngs=RNGS)
    tensors = to_torch(module)
    five = flax_attention(15, heads=5, rngs=RNGS)
    load_torch(five, tensors)  # the same width in five heads
    np.testing.assert_array_equal(to_torch(five)["in_proj_weight"], tensors["in_proj_weight"])
    tensors["in_proj_weight"] = np.ones((42, 15), np.float32)
    with pytest.raises(ConversionError, match=r"unfit: in_proj_weight .*\(42, 15\) does not fit"):
        load_torch(module, tensors)
    normal = flax_attention(15, normalize_qk=True, rngs=RNGS)
    with pytest.raises(ConversionError, match=r"missing: key_ln\.scale"):
        load_torch(normal, to_torch(module))
    with pytest.raises(ConversionError, match=r"unused: query_ln\.scale"):
        to_torch(normal)


NAMES = list(dict.fromkeys(table.names for table in TABLES[nn.MultiHeadAttention]))
SUBSETS = ["".join(some) for n in range(5) for some in itertools.combinations("qkvo", n)]


@pytest.mark.parametrize("names", NAMES)
def test_every_convention_travels(names):
    module, other = multi_head(), multi_head()
    load_torch(module, distinct(module))
    tensors = to_torch(module, names=names)
    load_torch(other, tensors)
    same(module, other)


def same(module, other):
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(module, nnx.Param)),
        nnx.to_pure_dict(nnx.state(other, nnx.Param)),
    )


@pytest.mark.parametrize("biases", SUBSETS)
@pytest.mark.parametrize("names", NAMES)
def test_each_projection_has_a_bias_or_none(names, biases):
    module, other = multi_head(biases), multi_head(biases)
    load_torch(module, distinct(module))
    if names == "torch.nn.MultiheadAttention" and len(set(biases) & set("qkv")) not in (0, 3):
        with pytest.raises(ConversionError, match=r"for .* → in_proj_bias"):
            to_torch(module, names=names)
        return
    load_torch(other, to_torch(module, names=names))
    same(module, other)


@pytest.mark.parametrize(("tensors", "module"), [("qkv", "qkvo"), ("qkvo", "qkv")])
def test_a_bias_on_one_side_alone_is_told(tensors, module):
    with pytest.raises(ConversionError) as caught:
        load_torch(multi_head(module), distinct(multi_head(tensors)))
    found = caught.value
    if len(tensors) > len(module):
        assert found.unused == ("W_o.bias → out.bias (the module has no out.bias)",)
    else:
        assert found.missing == ("out.bias",)
    assert not found.hint


def test_names_that_no_table_of_the_class_has():
    with pytest.raises(ValueError, match=r"names: expected one of 'W_q, W_o', .* got 'W_k'"):
        to_torch(multi_head(), names="W_k")


def test_the_error_is_that_of_the_table_that_knows_most_names():
    tensors = to_torch(multi_head(), names="q_proj, o_proj")
    del tensors["k_proj.weight"]
    with pytest.raises(ConversionError) as caught:
        load_torch(multi_head(), tensors | {"rotary.inv_freq": np.ones(3)})
    assert caught.value.unused == ("rotary.inv_freq",)
    assert caught.value.missing == ("key.kernel",)


def test_the_error_of_a_wrong_table_names_the_right_one():
    packed = to_torch(multi_head(), names="torch.nn.MultiheadAttention")
    fits = r"these names fit MultiHeadAttention \(torch.nn.MultiheadAttention\)"
    with pytest.raises(ConversionError, match=fits):
        load_torch(multi_head(), packed, torch_rules(nn.MultiHeadAttention))
    with pytest.raises(ConversionError, match=fits):
        load_torch(nn.SelfAttention(15, 15, rngs=RNGS), packed)


def test_a_prefix_before_every_name_is_told():
    network = nn.LSTM(3, 4, rngs=nnx.Rngs(0))
    tensors = {f"rnn.{name}": array for name, array in to_torch(network).items()}
    with pytest.raises(ConversionError, match="these names fit without 'rnn' and its dot"):
        load_torch(network, tensors)


def test_weights_without_biases_are_told():
    network = nn.LSTM(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(ConversionError, match="no biases: use_bias=False makes a module"):
        load_torch(nn.LSTM(3, 4, rngs=nnx.Rngs(0)), to_torch(network))


@pytest.mark.parametrize("wrap", [
    lambda linear: nnx.LoRA(15, 2, 15, base_module=linear, rngs=RNGS),
    lambda linear: nnx.LoRALinear(15, 15, lora_rank=2, rngs=RNGS),
    lambda linear: nnx.WeightNorm(linear, rngs=RNGS),
], ids=["LoRA", "LoRALinear", "WeightNorm"])  # fmt: skip
def test_a_wrapped_projection_is_told(wrap):
    tensors, module = distinct(multi_head()), multi_head()
    module.query = wrap(module.query)
    kind = type(module.query).__name__
    with pytest.raises(ConversionError, match=f"query is a {kind}: load the weights first, then"):
        load_torch(module, tensors)
    with pytest.raises(ConversionError, match=f"query is a {kind}: its weights have no name in"):
        to_torch(module)


@pytest.mark.torch
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 7, "vdim": 11}, {"kdim": 7}, {"vdim": 11}])
def test_multihead_attention_of_torch(x64, widths, bias):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    reference = torch.nn.MultiheadAttention(
        15, 3, bias=bias, batch_first=True, dtype=torch.float64, **widths
    )
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter)
    query, key, value = (
        torch.randn(2, length, width, dtype=torch.float64)
        for length, width in ((5, 15), (7, widths.get("kdim", 15)), (7, widths.get("vdim", 15)))
    )
    module = nn.MultiHeadAttention(
        3,
        15,
        in_kv_features=widths.get("kdim", 15),
        in_value_features=widths.get("vdim", 15),
        use_bias=bias,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    load_torch(module, reference.state_dict())
    expected = reference(query, key, value)[0].detach().numpy()
    found = module(query.numpy(), key.numpy(), value.numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    back = to_torch(module, names="torch.nn.MultiheadAttention")
    assert back.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        assert back[name].tobytes() == tensor.numpy().tobytes(), name


@pytest.mark.torch
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [15, 7])
def test_the_attention_of_flax_computes_that_of_torch(x64, width, bias):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    widths = {} if width == 15 else {"kdim": width, "vdim": width}
    reference = torch.nn.MultiheadAttention(
        15, 3, bias=bias, batch_first=True, dtype=torch.float64, **widths
    )
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter)
    module = flax_attention(
        width, use_bias=bias, attention_fn=nn.attention_fn(),  # for Flax's softmax is float32
        param_dtype=jnp.float64, rngs=nnx.Rngs(0),
    )  # fmt: skip
    load_torch(module, reference.state_dict())
    query, key, value = (
        torch.randn(2, length, size, dtype=torch.float64)
        for length, size in ((5, 15), (7, width), (7, width))
    )
    hidden = torch.rand(5, 7) < 0.3
    expected = reference(query, key, value, attn_mask=hidden)[0].detach().numpy()
    found = module(query.numpy(), key.numpy(), value.numpy(), mask=~hidden.numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    back = to_torch(module)
    assert back.keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        assert back[name].tobytes() == tensor.numpy().tobytes(), name
