"""BERT reads both ways, past no padding, and says what it cannot read."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn import masks, models, modifiers, nn
from jattn.models import bert
from jattn.models.bert import Config

B, T, C, D, L = 3, 7, 11, 8, 9
SMALL = Config(C, D, 1, 2, 16, max_length=L)
LENGTHS = np.array([7, 3, 5])
POSITIONS = ["absolute", "relative_key", "relative_key_query"]
RELATIVE = POSITIONS[1:]
KINDS = [
    models.Bert,
    models.BertForMaskedLM,
    models.BertForPreTraining,
    models.BertForSequenceClassification,
    models.BertForTokenClassification,
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
# Published numbers of parameters, the pooler's included
PARAMETERS = {
    "bert-base-uncased": 109_482_240,
    "bert-base-cased": 108_310_272,
    "bert-large-uncased": 335_141_888,
    "all-MiniLM-L6-v2": 22_713_216,
}


def make(kind=models.Bert, *, dtype=None, param_dtype=jnp.float32, attend=jattn.attend, **changes):
    """Without dropout, and large enough numbers that all matter."""
    config = dataclasses.replace(SMALL, **changes)
    model = kind(config, dtype=dtype, param_dtype=param_dtype, attend=attend, rngs=nnx.Rngs(1))
    model.eval()
    return scaled(model, 10)


def scaled(model, factor):
    """A model whose matrices are greater, so that attention is far from a mean."""
    grow = {leaf: factor for leaf in ("kernel", "embedding")}
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    grown = [(path, leaf.replace(leaf[...] * grow.get(path[-1], 1))) for path, leaf in state]
    nnx.update(model, nnx.from_flat_state(grown))
    return model


@jax.jit
def compiled(model, tokens, options):
    return model(tokens, **options)


def run(model, tokens, **options):
    return compiled(model, tokens, options)


def close(found, expected, tolerance=1e-12):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


@pytest.fixture
def tokens(rng):
    return rng.integers(1, C, (B, T))


@pytest.fixture
def types():
    return np.repeat([[0, 1]], B, 0).repeat([4, 3], 1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * ("large" in name)) for name in PARAMETERS],
)
def test_presets_have_the_published_number_of_parameters(name):
    config = Config.preset(name)
    model = nnx.eval_shape(lambda: models.Bert(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == PARAMETERS[name]
    assert set(bert.PRESETS) == set(PARAMETERS)


@pytest.mark.parametrize("positions", POSITIONS[::2])
def test_padding_changes_nothing_for_real_tokens(positions, tokens, types, x64):
    model = make(param_dtype=jnp.float64, positions=positions)
    found = run(model, tokens, types=types, lengths=LENGTHS)
    alone = run(model, tokens[1:2, :3], types=types[1:2, :3])
    close(found[1:2, :3], alone)
    close(model.pool(found)[1:2], model.pool(alone))
    close(found[0], run(model, tokens, types=types)[0])
    other = np.where(np.arange(T) < LENGTHS[:, None], tokens, (tokens + 1) % C)
    changed = run(model, other, types=types, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(changed[row, :length], found[row, :length])


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_head_hides_padding(kind, tokens, x64):
    model = make(kind, param_dtype=jnp.float64)
    found = run(model, tokens, lengths=LENGTHS)
    alone = run(model, tokens[1:2, :3])
    for all_rows, one in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        close(all_rows[1:2, :3] if all_rows.ndim == 3 else all_rows[1:2], one)


def test_lengths_count_slots_also_where_positions_are_given(tokens, x64):
    model, places = make(param_dtype=jnp.float64), np.arange(2, 2 + T)
    found = run(model, tokens, lengths=LENGTHS, positions=places)
    close(found[1:2, :3], run(model, tokens[1:2, :3], positions=places[:3]))


def test_every_token_sees_all_others(tokens, x64):
    model = make(param_dtype=jnp.float64)
    before = run(model, tokens)
    for place in range(T):
        changed = tokens.copy()
        changed[:, place] = changed[:, place] % (C - 1) + 1
        assert (run(model, changed) != before).any(-1).all()


def test_a_token_of_no_type_is_of_type_0_whose_row_is_added(tokens, types, x64):
    model = make(param_dtype=jnp.float64)
    expected = run(model, tokens, types=types * 0)
    close(run(model, tokens), expected)
    assert np.abs(run(model, tokens, types=types) - expected).max() > 1e-2
    model.types.embedding[...] = model.types.embedding[...].at[0].add(jnp.arange(float(D)))
    assert np.abs(run(model, tokens) - expected).max() > 1e-2


@pytest.mark.parametrize("positions", POSITIONS)
def test_left_padding_with_its_mask_and_positions_is_no_padding(positions, tokens, x64):
    model = make(param_dtype=jnp.float64, positions=positions)
    real = np.arange(T) >= (T - LENGTHS)[:, None]
    own = np.maximum(np.arange(T) - (T - LENGTHS)[:, None], 0)
    found = run(model, tokens, mask=real[:, None, None], positions=own)
    alone = run(model, tokens[1:2, -3:])
    close(found[1:2, -3:], alone)
    close(found[0], run(model, tokens)[0])
    if positions == "absolute":
        without = run(model, tokens, mask=real[:, None, None])
        assert np.abs(without[1:2, -3:] - alone).max() > 0.1


@pytest.mark.parametrize("positions", RELATIVE)
def test_relative_positions_know_distances_alone(positions, tokens, x64):
    model = make(param_dtype=jnp.float64, positions=positions)
    assert model.positions is None
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert not any(name.startswith("positions") for name in names)
    assert model.layers[0].attention.attend.embedding.shape == (2 * L - 1, D // 2)
    expected = run(model, tokens)
    for start in (0, 1, 1000):
        close(run(model, tokens, positions=start + np.arange(T)), expected)
    assert np.abs(run(model, tokens, positions=np.arange(T)[::-1]) - expected).max() > 1e-3
    assert np.abs(run(model, tokens[:, ::-1])[:, ::-1] - expected).max() > 1e-3  # left is not right
    with pytest.raises(ValueError, match="got 10 tokens, beyond the 9 relative positions"):
        model(np.zeros((1, L + 1), int))
    far = np.array([0, 1, 2, 3, 4, 5, L])
    found = run(model, tokens, positions=far)
    assert np.isnan(found).all(-1).tolist() == [[True, *[False] * 5, True]] * B
    assert model(np.zeros((1, L), int)).shape == (1, L, D)


def test_without_a_table_of_positions_absolute_ones_would_be_lost(tokens, x64):
    """The absolute table counts: the same tokens elsewhere are something else."""
    model = make(param_dtype=jnp.float64)
    shifted = run(model, tokens, positions=1 + np.arange(T))
    assert np.abs(shifted - run(model, tokens)).max() > 1e-2
    close(run(model, tokens, positions=np.tile(np.arange(T), (B, 1))), run(model, tokens))


def test_the_row_of_the_pad_begins_as_zero_and_learns_from_the_decoder_alone(tokens):
    padded = np.where(np.arange(T) < LENGTHS[:, None], tokens, 0)
    model = models.BertForMaskedLM(SMALL, rngs=nnx.Rngs(1))
    model.eval()
    assert not model.bert.embedding.embedding[0].any()

    def gradient(model, loss):
        return nnx.jit(nnx.grad(loss))(model).bert.embedding.embedding[...]

    of_lookups = gradient(model, lambda model: jnp.square(model.bert(padded)[..., 0]).sum())
    assert not of_lookups[0].any() and np.abs(of_lookups[padded[0, 0]]).max() > 0
    tied = gradient(model, lambda model: jnp.sin(1 + model(padded)).sum())
    assert np.abs(tied[0]).max() > 0
    untied = models.BertForMaskedLM(dataclasses.replace(SMALL, tied=False), rngs=nnx.Rngs(1))
    untied.eval()
    assert not gradient(untied, lambda model: jnp.sin(1 + model(padded)).sum())[0].any()
    free = models.Bert(dataclasses.replace(SMALL, pad=None), rngs=nnx.Rngs(1))
    assert free.embedding.embedding[0].any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [models.BertForMaskedLM, models.BertForPreTraining])
def test_words_at_places_are_those_gathered(kind, tied, tokens, x64):
    model = make(kind, param_dtype=jnp.float64, tied=tied)
    places = np.array([[0, 6], [2, 2], [5, 1]])
    found, expected = run(model, tokens, places=places), run(model, tokens)
    if kind is models.BertForPreTraining:
        close(found[1], expected[1])
        found, expected = found[0], expected[0]
    close(found, np.take_along_axis(np.asarray(expected), places[..., None], axis=1))
    assert found.shape == (B, 2, C)


def test_places_beyond_the_sequence_are_nan_under_jit(tokens):
    model, places = make(models.BertForMaskedLM), np.array([[0, T], [-1, 2], [5, 1]])
    found = jax.jit(lambda places: model(tokens, places=places))(places)
    wrong = np.array([[0, 1], [1, 0], [0, 0]], bool)
    np.testing.assert_array_equal(np.isnan(found).all(-1), wrong)
    np.testing.assert_array_equal(np.isnan(found).any(-1), wrong)


def test_the_kernel_of_the_words_is_the_table_or_one_of_its_own():
    tied, untied = make(models.BertForMaskedLM), make(models.BertForMaskedLM, tied=False)
    assert tied.words.out is None and untied.words.out.kernel.shape == (D, C)
    assert untied.words.out.bias is None and tied.words.bias.shape == (C,)
    x = jnp.ones((2, D))
    before = tied.words(x, tied.bert.embedding.embedding[...])
    tied.bert.embedding.embedding[...] *= 2
    np.testing.assert_allclose(
        tied.words(x, tied.bert.embedding.embedding[...]), 2 * before, rtol=1e-6
    )


def test_pooling_needs_a_pooler(tokens):
    model = models.Bert(SMALL, pooler=False, rngs=nnx.Rngs(0))
    hidden = model(tokens, deterministic=True)
    with pytest.raises(ValueError, match="has no pooler: pooler=True makes one"):
        model.pool(hidden)
    full = make()
    pooled = np.tanh(hidden[:, 0] @ full.pooler.kernel[...] + full.pooler.bias[...])
    np.testing.assert_allclose(full.pool(hidden), pooled, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"pooler must be \[D, D\] with D = 3"):
        full.pool(jnp.ones((2, 5, 3)))
    with pytest.raises(TypeError, match="pooler must be True or False"):
        models.Bert(SMALL, pooler=1, rngs=nnx.Rngs(0))


def test_which_heads_have_a_pooler():
    poolers = {kind: getattr(make(kind), "bert", make(kind)).pooler is not None for kind in KINDS}
    assert list(poolers.values()) == [True, False, True, True, False]


@every_kind
def test_dropout_follows_its_switches(kind, tokens):
    model = kind(SMALL, rngs=nnx.Rngs(0))
    of = lambda **options: jax.tree.leaves(model(tokens, **options))[0]  # noqa: E731
    first, second, clean = of(), of(), of(deterministic=True)
    assert (first != second).any() and np.isfinite(first).all()
    np.testing.assert_array_equal(of(deterministic=True), clean)
    model.eval()
    np.testing.assert_array_equal(of(), clean)
    assert (of(deterministic=False) != clean).any()


@pytest.mark.parametrize(
    ("on", "places"),
    [
        ({"dropout_rate": 1.0}, "embeddings and layers"),
        ({"attention_dropout_rate": 1.0}, "weights"),
        ({}, "nothing"),
    ],
)
def test_each_rate_is_of_its_own_place(on, places, tokens):
    rates = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0} | on
    model = models.Bert(dataclasses.replace(SMALL, **rates), rngs=nnx.Rngs(0))
    found, clean = model(tokens), model(tokens, deterministic=True)
    if places == "nothing":
        np.testing.assert_array_equal(found, clean)
    elif places == "weights":
        block = model.layers[0]
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, D)), jnp.float32)
        y = block.norm1(x)  # whose value Linears have no biases yet
        np.testing.assert_allclose(block(x), block.norm2(y + block.mlp(y)), rtol=1e-5, atol=1e-6)
    else:
        assert not found.any()


@pytest.mark.parametrize(
    "kind", [models.BertForSequenceClassification, models.BertForTokenClassification]
)
def test_a_classifier_drops_before_its_linear(kind, tokens):
    """None is the rate of the embeddings; all dropped, the logits are the bias."""
    rates = {"dropout_rate": 0.25, "attention_dropout_rate": 0.0}
    config = dataclasses.replace(SMALL, **rates, classes=5)
    assert kind(config, rngs=nnx.Rngs(0)).dropout.rate == 0.25
    zero = kind(dataclasses.replace(config, classifier_dropout_rate=0.0), rngs=nnx.Rngs(0))
    assert zero.dropout.rate == 0 and zero.bert.dropout.rate == 0.25
    model = kind(dataclasses.replace(config, classifier_dropout_rate=1.0), rngs=nnx.Rngs(0))
    model.out.bias[...] = jnp.arange(5.0)
    found = model(tokens)
    shape = (B, 5) if kind is models.BertForSequenceClassification else (B, T, 5)
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(5.0), shape))
    assert (model(tokens, deterministic=True) != found).any()


@pytest.mark.parametrize("positions", POSITIONS[::2])
def test_bfloat16_computes_in_bfloat16(positions, tokens):
    for kind in KINDS[2::2] if positions == "absolute" else KINDS[:1]:
        exact = make(kind, positions=positions)
        model = make(kind, dtype=jnp.bfloat16, positions=positions)
        parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
        assert {leaf.dtype for leaf in parameters} == {jnp.dtype("float32")}
        found, expected = run(model, tokens), run(exact, tokens)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert one.dtype == jnp.bfloat16
            largest = float(np.abs(other).max())
            np.testing.assert_allclose(one.astype(np.float32), other, rtol=0, atol=0.1 * largest)
    narrow = make(param_dtype=jnp.bfloat16, positions=positions)
    assert run(narrow, tokens).dtype == jnp.bfloat16


@pytest.mark.parametrize("positions", POSITIONS[::2])
def test_one_token_and_one_sequence_without_a_batch(positions, tokens, x64):
    model = make(param_dtype=jnp.float64, positions=positions)
    assert (
        run(model, tokens[:, :1]).shape == (B, 1, D)
        and np.isfinite(run(model, tokens[:, :1])).all()
    )
    close(run(model, tokens[1]), run(model, tokens)[1])
    close(run(model, tokens[1], lengths=np.int32(3))[:3], run(model, tokens[1:2, :3])[0])
    several = run(model, np.stack([tokens, tokens]), lengths=np.stack([LENGTHS, LENGTHS]))
    close(several[1], run(model, tokens, lengths=LENGTHS))


@pytest.mark.parametrize("kind", [models.BertForPreTraining, models.BertForTokenClassification])
def test_vmap_over_examples_is_a_batch(kind, tokens, types, x64):
    model = make(kind, param_dtype=jnp.float64)

    def one(tokens, types, length):
        return run(model, tokens, types=types, lengths=length)

    expected = run(model, tokens, types=types, lengths=LENGTHS)
    close(jax.vmap(one)(tokens, types, LENGTHS), expected)


def test_a_sequence_with_nothing_to_see_gets_zeros_from_attention(tokens):
    """And is finite: x₁ = norm₁(x + b), b the bias of attention's output."""
    block = make().layers[0]
    block.attention.out.bias[...] = jnp.arange(float(D))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
    y = block.norm1(x + jnp.arange(float(D)))
    found = block(x, mask=np.zeros((T, T), bool))
    np.testing.assert_allclose(found, block.norm2(y + block.mlp(y)), rtol=1e-5, atol=1e-5)
    empty = make()(tokens, lengths=np.array([7, 0, 5]))
    assert np.isfinite(empty).all()


def test_norms_keep_their_digits_far_from_zero():
    """Published ε is 10⁻¹²: a variance as E[x²] − E[x]² would be rounding alone."""
    model, x = make(), np.float32([1000, 1001, 1002, 1003, 1000, 1001, 1002, 1003])
    wide = x.astype(np.float64)
    expected = (wide - wide.mean()) / wide.std()
    for norm in (model.norm, model.layers[0].norm1, make(models.BertForMaskedLM).words.norm):
        np.testing.assert_allclose(norm(x), expected, rtol=1e-4)


def test_gelu_is_by_the_error_function_unless_another_is_given(tokens, x64):
    model = make(param_dtype=jnp.float64)
    by_tanh = make(param_dtype=jnp.float64, activation=functools.partial(jax.nn.gelu))
    exact = functools.partial(jax.nn.gelu, approximate=False)
    close(run(make(param_dtype=jnp.float64, activation=exact), tokens), run(model, tokens))
    assert np.abs(run(by_tanh, tokens) - run(model, tokens)).max() > 1e-6
    heads = [make(models.BertForMaskedLM, activation=name) for name in ("relu", "gelu")]
    x = jnp.ones((1, D), jnp.float32)
    first, second = (head.words(x, heads[0].bert.embedding.embedding[...]) for head in heads)
    assert (first != second).any()


@pytest.mark.parametrize("positions", POSITIONS[::2])
def test_attend_sets_kernel_mask_and_modifier(positions, tokens, x64):
    build = functools.partial(make, param_dtype=jnp.float64, positions=positions)
    expected = build()(tokens, lengths=LENGTHS)
    blockwise = functools.partial(jattn.attend, implementation="blockwise")
    found = build(attend=blockwise)(tokens, lengths=LENGTHS)
    close(found[1, :3], expected[1, :3])
    causal = functools.partial(jattn.attend, mask=masks.causal())
    close(build(attend=causal)(tokens), build()(tokens, mask=masks.causal()))
    capped = functools.partial(jattn.attend, modifier=modifiers.soft_cap(0.5))
    assert np.abs(build(attend=capped)(tokens)[0] - expected[0]).max() > 1e-3
    sunk = build(attend=nn.AttentionSink(2, rngs=nnx.Rngs(0)))
    assert np.abs(sunk(tokens)[0] - expected[0]).max() > 1e-3


def test_a_mask_is_joined_to_the_padding(tokens, x64):
    model = make(param_dtype=jnp.float64)
    found = run(model, tokens, lengths=LENGTHS, mask=masks.no_self())
    close(found[1:2, :3], run(model, tokens[1:2, :3], mask=masks.no_self()))
    assert np.abs(found - run(model, tokens, lengths=LENGTHS)).max() > 1e-2


def test_a_model_is_a_value(tokens):
    first, second = make(), make()
    again = pickle.loads(pickle.dumps(first))
    assert nnx.graphdef(first) == nnx.graphdef(second) == nnx.graphdef(again)
    np.testing.assert_array_equal(first(tokens), again(tokens))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "length 10, beyond the 9", lambda m, t: m(np.zeros((1, 10), int))),
        (ValueError, "tokens must lie in 0 … 10 .*got 15", lambda m, t: m(t * 0 + 15)),
        (ValueError, "tokens must lie in 0 … 10 .*got -1", lambda m, t: m(t * 0 - 1)),
        (TypeError, "tokens must be integers", lambda m, t: m(t * 1.0)),
        (ValueError, r"tokens must be \[..., T\]", lambda m, t: m(np.int32(3))),
        (ValueError, "types must lie in 0 … 1 .*got 2", lambda m, t: m(t, types=t * 0 + 2)),
        (ValueError, "types must lie in 0 … 1 .*got -1", lambda m, t: m(t, types=t * 0 - 1)),
        (ValueError, r"types must be .*got shape \(7,\)", lambda m, t: m(t, types=t[0])),
        (TypeError, "types must be integers", lambda m, t: m(t, types=t * 0.0)),
        (
            ValueError,
            "positions must lie in 0 … 8 .*got 9",
            lambda m, t: m(t, positions=np.arange(3, 10)),
        ),
        (
            ValueError,
            r"positions must be \[T\] or",
            lambda m, t: m(t, positions=np.arange(3)),
        ),
        (TypeError, "positions must be integers", lambda m, t: m(t, positions=np.arange(7.0))),
        (ValueError, "lengths must lie in 0 … 7", lambda m, t: m(t, lengths=LENGTHS + 1)),
        (ValueError, "lengths must lie in 0 … 7", lambda m, t: m(t, lengths=LENGTHS - 4)),
        (ValueError, r"lengths must be .*\(2,\)", lambda m, t: m(t, lengths=LENGTHS[:2])),
        (TypeError, "lengths must be integers", lambda m, t: m(t, lengths=LENGTHS * 1.0)),
        (ValueError, "mask must broadcast", lambda m, t: m(t, mask=np.ones((3, 3), bool))),
    ],
)
def test_bad_input_is_named_before_anything_is_compiled(error, match, call, tokens):
    with pytest.raises(error, match=match):
        call(make(), tokens)


@pytest.mark.parametrize(
    ("error", "match", "places"),
    [
        (ValueError, "places must lie in 0 … 6", [[0, 7]] * B),
        (ValueError, "places must lie in 0 … 6", [[0, -1]] * B),
        (ValueError, r"places must be .*got shape \(2,\)", [0, 1]),
        (TypeError, "places must be integers", [[0.0]] * B),
    ],
)
def test_bad_places_are_named(error, match, places, tokens):
    with pytest.raises(error, match=match):
        make(models.BertForMaskedLM)(tokens, places=np.array(places))


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, "vocabulary must be", {"vocabulary": 0}),
        (ValueError, "features must be", {"features": -8}),
        (ValueError, "num_layers must be", {"num_layers": 0}),
        (ValueError, "num_layers must be", {"num_layers": 1.0}),
        (ValueError, r"features \(8\) must be a multiple of num_heads \(3\)", {"num_heads": 3}),
        (ValueError, "mlp_features must be", {"mlp_features": 0}),
        (ValueError, "max_length must be", {"max_length": 0}),
        (ValueError, "num_types must be", {"num_types": 0}),
        (ValueError, "classes must be", {"classes": 0}),
        (ValueError, "epsilon must be positive, got 0", {"epsilon": 0}),
        (ValueError, "epsilon must be positive, got nan", {"epsilon": float("nan")}),
        (ValueError, "positions must be one of .*got 'rope'", {"positions": "rope"}),
        (ValueError, "dropout_rate must lie in 0 … 1", {"dropout_rate": 1.5}),
        (TypeError, "dropout_rate must be a Python number", {"dropout_rate": "0.1"}),
        (ValueError, "attention_dropout_rate must lie", {"attention_dropout_rate": -0.1}),
        (ValueError, "classifier_dropout_rate must lie", {"classifier_dropout_rate": 2.0}),
        (ValueError, "pad must be an id below 11", {"pad": C}),
        (ValueError, "pad must be an id below 11", {"pad": -1}),
        (TypeError, "tied must be True or False", {"tied": 1}),
        (TypeError, "^dropout_rate must be a Python number", {"dropout_rate": None}),
        (ValueError, "pad must be an id below 11", {"pad": 1.5}),
        (ValueError, "activation must be 'relu', 'gelu'", {"activation": "swish"}),
    ],
)
def test_a_config_says_what_does_not_fit(error, match, changes):
    with pytest.raises(error, match=match):
        dataclasses.replace(SMALL, **changes)


def test_names_that_are_unknown():
    with pytest.raises(ValueError, match=r"name must be one of bert-base-uncased, .*got 'roberta'"):
        Config.preset("roberta")
    assert Config.preset("bert-base-uncased", classes=3).classes == 3
    with pytest.raises(ValueError, match="activation must be 'relu', 'gelu' or a function"):
        make(activation="swish")


def test_what_cannot_be_seen_under_jit_is_nan(tokens, types):
    model = make()

    @jax.jit
    def encode(tokens, types, lengths, positions):
        return model(tokens, types=types, lengths=lengths, positions=positions)

    places = np.tile(np.arange(T), (B, 1))
    good = tokens, types, LENGTHS, places
    assert np.isfinite(encode(*good)).all()
    for index, (row, wrong) in enumerate([((1, 0), C), ((1, 2), 2), (1, T + 1), ((1, 0), L)]):
        for bad in (wrong, -1):
            changed = [each.copy() for each in good]
            changed[index][row] = bad
            found = encode(*changed)
            assert np.isnan(found[1, :3]).all(), (index, bad)
            assert np.isfinite(found[::2]).all(), (index, bad)
