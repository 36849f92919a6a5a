"""Modules of PyTorch and of `transformers`, and ports of them as people write them.

Layers, weights and layouts are guessed; what is equal is called equal, and what is not, located.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import linen, nnx

from jattn import models, nn, parity
from jattn.interop import ConversionError

pytestmark = pytest.mark.torch


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


@pytest.fixture
def x(rng):
    return rng.normal(size=(2, 3, 8))


def rngs():
    return nnx.Rngs(0)


def built(torch, forward, **layers):
    """A module of PyTorch, of layers and a function of them and the inputs."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

    Module.forward = forward
    return Module()


class Patches(nnx.Module):
    """The beginning of a vision transformer."""

    def __init__(self, epsilon=1e-6):
        self.proj = nnx.Conv(3, 8, (4, 4), strides=4, padding="VALID", rngs=rngs())
        self.norm, self.head = (
            nnx.LayerNorm(8, epsilon=epsilon, rngs=rngs()),
            nnx.Linear(8, 5, rngs=rngs()),
        )

    def __call__(self, x):
        x = self.proj(jnp.moveaxis(x, 1, -1))
        return self.head(self.norm(x.reshape(len(x), -1, 8)))


def test_convolutions_have_their_channels_elsewhere(torch, rng):
    def forward(self, x):
        return self.head(self.norm(self.proj(x).flatten(2).transpose(1, 2)))

    original = built(
        torch, forward, proj=torch.nn.Conv2d(3, 8, 4, 4), norm=torch.nn.LayerNorm(8, eps=1e-6),
        head=torch.nn.Linear(8, 5),
    )  # fmt: skip
    images = [rng.normal(size=(2, 3, 8, 8))]
    report = parity.check(original, Patches(), images)
    assert report.passed, str(report)
    assert [row.flax for row in report.layers] == ["proj", "norm", "head", ""]
    assert all(row.error < 1e-14 for row in report.layers)
    report = parity.check(original, Patches(1e-5), images)
    assert report.first.flax == "norm" and report.hints == ("matches with eps 1e-06",)


def test_a_batch_norm_is_given_the_running_statistics(torch, rng):
    class Port(nnx.Module):
        def __init__(self, port_norm):
            self.conv = nnx.Conv(4, 6, (3,), padding=1, rngs=rngs())
            self.norm = port_norm

        def __call__(self, x):
            return self.norm(self.conv(x.swapaxes(1, 2))).mean(1)

    def forward(self, x):
        return self.norm(self.conv(x)).mean(-1)

    conv, norm = torch.nn.Conv1d(4, 6, 3, padding=1), torch.nn.BatchNorm1d(6)
    original = built(torch, forward, conv=conv, norm=norm)
    original(torch.randn(8, 4, 5) + 1)
    port = Port(nnx.BatchNorm(6, epsilon=1e-5, use_running_average=True, rngs=rngs()))
    report = parity.check(original, port, [rng.normal(size=(2, 4, 5))])
    assert report.passed, str(report)
    port = Port(nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs()))
    report = parity.check(original, port, [rng.normal(size=(2, 4, 5))])
    assert "is not given PyTorch's buffers norm.running_mean, norm.running_var" in report.hints[-1]


def test_a_batch_norm_in_training_mode_is_no_dropout(torch, x):
    port = nnx.BatchNorm(3, epsilon=1e-5, rngs=rngs())
    report = parity.check(torch.nn.BatchNorm1d(3), port, [x[0, :, :3]])
    assert not report.passed and not any("dropout" in hint for hint in report.hints)


def test_statistics_of_linen_are_float64_where_they_are_given(torch, x):
    original = torch.nn.BatchNorm1d(3)
    original(torch.randn(8, 3) + 1)
    mean, var = (getattr(original, f"running_{name}").numpy() for name in ("mean", "var"))
    port = linen.BatchNorm(use_running_average=True, epsilon=1e-5)
    params = {"params": {"scale": np.ones(3), "bias": np.zeros(3)},
              "batch_stats": {"mean": mean, "var": var}}  # fmt: skip
    report = parity.check(original, port, [x[0, :, :3]], params=params)
    assert report.passed, str(report)


def test_a_layer_that_gives_minus_infinity_hides_no_other(torch, x):
    class Masked(nnx.Module):
        def __call__(self, x):
            return jnp.where(x > 0, -jnp.inf, x)

    class Port(nnx.Module):
        def __init__(self):
            self.norm = nnx.LayerNorm(8, epsilon=1e-3, rngs=rngs())
            self.scores = nnx.Linear(8, 8, rngs=rngs())
            self.masked = Masked()

        def __call__(self, x):
            return nnx.softmax(self.masked(self.scores(self.norm(x))), axis=-1)

    def forward(self, x):
        scores = self.scores(self.norm(x))
        return torch.softmax(scores.masked_fill(scores > 0, -torch.inf), -1)

    norm, scores = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
    report = parity.check(built(torch, forward, norm=norm, scores=scores), Port(), [x])
    assert report.first.flax == "norm" and report.hints == ("matches with eps 1e-05",)


class Decoder(linen.Module):
    embed: linen.Module

    @linen.compact
    def __call__(self, x):
        return self.embed(jnp.tanh(linen.Dense(8)(x)))


class Tied(linen.Module):
    @linen.compact
    def __call__(self, x):
        embed = linen.Dense(
            8, name="embed",
            kernel_init=linen.with_partitioning(linen.initializers.lecun_normal(), (None, "a")),
        )  # fmt: skip
        return Decoder(embed, name="decoder")(embed(x))


def test_a_layer_of_linen_that_two_share_and_a_parameter_in_a_box(torch, x):
    def forward(self, x):
        return self.embed(torch.tanh(self.dense(self.embed(x))))

    linears = {"embed": torch.nn.Linear(8, 8), "dense": torch.nn.Linear(8, 8)}
    pairs = {"embed": "embed", "dense": "decoder.Dense_0"}
    assert_equal(parity.check(built(torch, forward, **linears), Tied(), [x], pairs=pairs))


def test_a_row_that_pytorch_never_trains(torch):
    class Port(nnx.Module):
        def __init__(self):
            self.table, self.out = nnx.Embed(7, 4, rngs=rngs()), nnx.Linear(4, 2, rngs=rngs())

        def __call__(self, ids):
            return self.out(self.table(ids))

    def forward(self, ids):
        return self.out(self.table(ids))

    table, out = torch.nn.Embedding(7, 4, padding_idx=0), torch.nn.Linear(4, 2)
    original = built(torch, forward, table=table, out=out)
    report = parity.check(original, Port(), [np.array([[0, 1, 2], [3, 0, 6]])])
    assert {row.name for row in report.rows if not row.passed} == {"grad/param/table.weight"}
    assert report.hints == ("row 0 of table.weight gets no gradient in PyTorch: padding_idx",)
    assert "a narrower type" not in str(report)


def attention(q, k, v):
    return nnx.softmax(q @ k.swapaxes(-1, -2) / 2) @ v


class Fused(nnx.Module):
    def __init__(self):
        self.qkv, self.out = nnx.Linear(8, 24, rngs=rngs()), nnx.Linear(8, 8, rngs=rngs())

    def __call__(self, x):
        heads = rearrange(self.qkv(x), "b t (parts n h) -> parts b n t h", parts=3, n=2)
        return self.out(rearrange(attention(*heads), "b n t h -> b t (n h)"))


class Apart(nnx.Module):
    def __init__(self):
        self.to_k, self.to_v, self.to_q, self.out = (
            nnx.Linear(8, 8, rngs=rngs()) for _ in range(4)
        )

    def __call__(self, x):
        each = (layer(x) for layer in (self.to_q, self.to_k, self.to_v))
        heads = (rearrange(y, "b t (n h) -> b n t h", n=2) for y in each)
        return self.out(rearrange(attention(*heads), "b n t h -> b t (n h)"))


@pytest.mark.parametrize("port", [Fused, Apart])
def test_projections_that_are_fused_on_one_side(torch, x, port):
    def heads(y):
        return y.unflatten(-1, (2, 4)).transpose(1, 2)

    def packed(self, x):
        q, k, v = map(heads, self.in_proj(x).chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(-2))

    def apart(self, x):
        q, k, v = (heads(layer(x)) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(-2))

    linears = {name: torch.nn.Linear(8, 8) for name in ("q", "k", "v", "out")}
    original = built(torch, apart, **linears)
    assert_equal(parity.check(original, port(), [x]))
    linears = {"in_proj": torch.nn.Linear(8, 24), "out": torch.nn.Linear(8, 8)}
    assert_equal(parity.check(built(torch, packed, **linears), port(), [x]))


@pytest.mark.parametrize("gate_first", [True, False])
def test_the_same_names_are_the_same_layers_whatever_is_called_first(torch, x, gate_first):
    class Port(nnx.Module):
        def __init__(self, swapped=False):
            self.gate, self.up = (nnx.Linear(8, 8, rngs=rngs()) for _ in range(2))
            self.swapped = swapped

        def __call__(self, x):
            calls = {"gate": self.gate, "up": self.up}
            found = {name: calls[name](x) for name in sorted(calls, reverse=not gate_first)}
            gate, up = found["gate"], found["up"]
            return nnx.silu(up) * gate if self.swapped else nnx.silu(gate) * up

    def forward(self, x):
        return torch.nn.functional.silu(self.gate(x)) * self.up(x)

    linears = {name: torch.nn.Linear(8, 8) for name in ("gate", "up")}
    original = built(torch, forward, **linears)
    assert_equal(parity.check(original, Port(), [x]))
    assert not parity.check(original, Port(swapped=True), [x]).passed


def assert_equal(report):
    assert report.passed, str(report)
    assert report.first is None and report.hints == ()


def test_a_mask_means_the_opposite_in_a_layer_and_the_port_inverts_it(torch, x, rng):
    class Port(nnx.Module):
        def __init__(self, inverts):
            self.inner = nnx.MultiHeadAttention(
                2, 8, decode=False, attention_fn=nn.attention_fn(), rngs=rngs()
            )
            self.inverts = inverts

        def __call__(self, x, mask):
            return self.inner(x, mask=(~mask if self.inverts else mask)[None, None])

    def forward(self, x, mask):
        return self.inner(x, x, x, attn_mask=mask)[0]

    original = built(torch, forward, inner=torch.nn.MultiheadAttention(8, 2, batch_first=True))
    mask = np.triu(np.ones((3, 3), bool), 1)
    assert_equal(parity.check(original, Port(True), [x, mask]))
    report = parity.check(original, Port(False), [x, mask])
    assert report.first.flax == "inner" and report.hints == ("matches if the mask is inverted",)


def test_an_output_that_the_port_does_not_give(torch, x):
    original = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    port = nnx.MultiHeadAttention(2, 8, decode=False, attention_fn=nn.attention_fn(), rngs=rngs())
    report = parity.check(original, port, [x, x, x])
    assert {row.name: row.reason for row in report.rows}["output/output[1]"] == "missing"
    assert report.first is None and "the port gives no output[1]" in report.hints[0]


def test_an_output_of_another_shape(torch, x):
    report = parity.check(torch.nn.GRU(8, 5, batch_first=True), nn.GRU(8, 5, rngs=rngs()), [x])
    reasons = {row.name: row.reason for row in report.rows}
    assert reasons["output/output[1]"] == "(2, 1, 5) for (1, 2, 5)"
    assert report.first.torch == "" and report.hints == ()
    assert "by the shapes of its outputs, (2, 3, 5), (2, 1, 5) for" in str(report)


def test_a_module_that_keeps_a_table_of_its_first_call(torch, x):
    def forward(self, x):
        if not hasattr(self, "table"):
            self.table = torch.arange(8, dtype=x.dtype) / 3
        return self.out(x + self.table)

    class Port(nnx.Module):
        def __init__(self):
            self.out = nnx.Linear(8, 8, rngs=rngs())

        def __call__(self, x):
            return self.out(x + jnp.arange(8) / 3)

    assert_equal(parity.check(built(torch, forward, out=torch.nn.Linear(8, 8)), Port(), [x]))


def test_two_outputs_of_one_name(torch, x):
    original = built(torch, lambda self, x: {"a": {"h": x}, "b": {"h": 2 * x}})
    with pytest.raises(ValueError, match="two outputs have the name h"):
        parity.record(original, [x])


def test_inputs_may_be_numbers_and_empty(torch, x):
    def forward(self, x, scale):
        return scale * x

    for given in (x, x[:0]):
        report = parity.check(built(torch, forward), lambda x, scale: scale * x, [given, 0.5])
        assert_equal(report)


def test_the_carry_of_a_cell_of_flax_is_float64_and_its_one_bias_needs_rules(torch, x):
    port = nnx.RNN(nnx.OptimizedLSTMCell(8, 5, rngs=rngs()))
    original = torch.nn.LSTM(8, 5, batch_first=True)
    with pytest.raises(ConversionError, match=r"unused: bias_.h_l0\n.*pass rules"):
        parity.check(original, port, [x])


def test_a_layer_called_twice_and_frozen(torch, x):
    class Port(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(8, 8, rngs=rngs())

        def __call__(self, x):
            y = self.inner(self.inner(x))
            return {"sum": y.sum(), "y": y}

    def forward(self, x):
        y = self.inner(self.inner(x))
        return {"y": y, "sum": y.sum()}

    original = built(torch, forward, inner=torch.nn.Linear(8, 8)).requires_grad_(False)
    report = parity.check(original, Port(), [x])
    assert_equal(report)
    assert [row.torch for row in report.layers] == ["inner[0]", "inner[1]", ""]


class ScannedBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        gate = jax.nn.sigmoid(linen.Dense(8, name="gate")(x))
        return linen.LayerNorm(epsilon=1e-5)(
            x + gate * jnp.tanh(linen.Dense(8, name="fc")(x))
        ), None


class Scanned(linen.Module):
    count: int

    @linen.compact
    def __call__(self, x):
        scan = linen.scan(
            ScannedBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.count,
        )
        return linen.Dense(2)(scan(name="layers")(x, None)[0])


class Recomputed(linen.Module):
    count: int

    @linen.compact
    def __call__(self, x):
        for i in range(self.count):
            x, _ = linen.remat(ScannedBlock)(name=f"layers_{i}")(x, None)
        return linen.Dense(2)(x)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("kind", [Scanned, Recomputed])
def test_layers_under_a_transformation_have_their_weights_stacked_or_not(torch, x, kind, count):
    port = kind(count)

    def block(self, x):
        return self.norm(x + torch.sigmoid(self.gate(x)) * torch.tanh(self.fc(x)))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.out(x)

    def linear():
        return torch.nn.Linear(8, 8)

    blocks = [
        built(torch, block, gate=linear(), fc=linear(), norm=torch.nn.LayerNorm(8))
        for _ in range(count)
    ]
    layers = torch.nn.ModuleList(blocks)
    original = built(torch, forward, layers=layers, out=torch.nn.Linear(8, 2))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(torch.randn_like(parameter))
    report = parity.check(original, port, [x])
    assert_equal(report)
    assert [row.torch for row in report.layers] == ["out[0]", ""]


def test_a_decoder_layer_of_ours(torch, x, rng):
    original = torch.nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    port = nn.TransformerDecoderLayer(8, 2, 16, rngs=rngs())
    inputs = [x, rng.normal(size=(2, 5, 8))]
    report = parity.check(original, port, inputs)
    assert report.hints == ("matches with dropout off: dropout was on",)
    port.eval()
    assert_equal(parity.check(original, port, inputs))


def test_bert_of_transformers(torch, rng):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    port = models.Bert(models.bert.Config(50, 16, 2, 2, 24, max_length=16), rngs=rngs())
    port.eval()

    def call(model, inputs):
        hidden = model(inputs["input_ids"])
        return [hidden, model.pool(hidden)]

    tokens = {"input_ids": rng.integers(0, 50, size=(2, 7))}
    report = parity.check(transformers.BertModel(config), port, tokens, call=call)
    assert_equal(report)
    pairs = {**report.pairs}
    assert pairs["encoder.layer.1.attention.self.query"] == "layers.1.attention.query"
    assert pairs["encoder.layer.1.intermediate.dense"] == "layers.1.mlp.linear1"


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_llama_of_transformers_whose_norms_ask_for_float32(torch, rng, epsilon):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24, rms_norm_eps=epsilon, use_cache=False,
    )  # fmt: skip
    port = models.CausalLM(models.causal_lm.Config(50, 16, 2, 4, 2, mlp_features=24), rngs=rngs())
    tokens = {"input_ids": rng.integers(0, 50, size=(2, 7))}
    report = parity.check(
        transformers.LlamaForCausalLM(config), port, tokens,
        call=lambda model, inputs: model(inputs["input_ids"]),
    )  # fmt: skip
    if epsilon == 1e-6:
        return assert_equal(report)
    assert report.first.flax == "layers.0.norm1"
    assert report.hints[0] == "matches with eps 1e-05"
    assert "is not given PyTorch's buffers model.rotary_emb.inv_freq" in report.hints[1]


def test_what_the_module_makes_for_itself_is_float64_too(torch, x):
    class Port(nnx.Module):
        def __init__(self):
            self.out = nnx.Linear(8, 8, rngs=rngs())

        def __call__(self, x):
            angles = jnp.arange(x.shape[1])[:, None] / 100.0 ** (jnp.arange(8) / 8)
            return self.out(x + jnp.sin(angles))

    def forward(self, x):
        steps, places = torch.arange(0.0, 8.0) / 8, torch.arange(x.shape[1], dtype=torch.float32)
        return self.out(x + torch.sin(places[:, None] / 100.0**steps).type(torch.float32))

    before = torch.get_default_dtype()
    assert_equal(parity.check(built(torch, forward, out=torch.nn.Linear(8, 8)), Port(), [x]))
    assert torch.get_default_dtype() == before


def test_weights_that_lie_as_in_flax(torch, x):
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    class Port(nnx.Module):
        def __init__(self, approximate):
            self.c_fc = nnx.Linear(8, 24, rngs=rngs())
            self.c_proj = nnx.Linear(24, 8, rngs=rngs())
            self.approximate = approximate

        def __call__(self, x):
            return self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=self.approximate))

    config = transformers.GPT2Config(n_embd=8, n_inner=24, n_head=2)
    original = GPT2MLP(24, config)
    assert_equal(parity.check(original, Port(True), [x]))
    report = parity.check(original, Port(False), [x])
    assert report.hints == ("matches with tanh GELU instead of the other form",)


def test_a_fused_projection_that_lies_as_in_flax(torch, x):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.c_attn(x).split(8, dim=-1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(-2))

    original = built(torch, forward, c_attn=Conv1D(24, 8), out=torch.nn.Linear(8, 8))
    for port in (Fused, Apart):
        assert_equal(parity.check(original, port(), [x]))
