"""`TorchMultiheadAttention` and `torch_masks` mean what PyTorch means."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn import interop, masks, nn

B, T, S, E, N = 3, 5, 7, 12, 3
LATER = np.triu(np.ones((T, S), bool), 1)
PADDING = np.arange(S) >= np.array([[3], [7], [5]])


def make(**options):
    return nn.TorchMultiheadAttention(E, N, rngs=nnx.Rngs(0), **{"batch_first": True} | options)


@pytest.fixture
def operands(rng):
    shapes = (B, T, E), (B, S, E), (B, S, E)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_sees_nothing_gives_the_bias_of_the_output(operands, need_weights):
    attention = make()
    attention.attention.out.bias[...] = jnp.arange(E, dtype=jnp.float32)
    hidden = np.zeros((T, S), bool)
    hidden[1] = True

    def call(operands):
        return attention(*operands, attn_mask=hidden, need_weights=need_weights)

    output, weights = call(operands)
    np.testing.assert_array_equal(output[:, 1], np.broadcast_to(np.arange(E), (B, E)))
    assert weights is None or not weights[:, 1].any()
    gradients = jax.grad(lambda operands: call(operands)[0].sum())(operands)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_the_learned_key_and_the_zero_are_never_hidden(operands):
    attention = make(add_bias_kv=True, add_zero_attn=True)
    everything = np.ones((T, S), bool)
    _, weights = attention(*operands, attn_mask=everything)
    assert weights.shape == (B, T, S + 2)
    assert not weights[..., :S].any()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    _, added = attention(*operands, attn_mask=np.where(everything, -np.inf, 0.0))
    np.testing.assert_array_equal(added, weights)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=["plain", "learned key"])
def test_is_causal_is_a_promise_and_changes_nothing(operands, options):
    attention = make(**options)
    with pytest.raises(ValueError, match="is_causal needs attn_mask"):
        attention(*operands, is_causal=True)
    expected, _ = attention(*operands, attn_mask=LATER)
    found, _ = attention(*operands, attn_mask=LATER, is_causal=True, need_weights=False)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_weights_are_those_before_dropout(operands):
    attention = make(dropout=0.9)
    attention.train()
    _, weights = attention(*operands)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    first, second = (attention(*operands)[0] for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_sequences_may_come_before_batches_or_alone(operands):
    attention, first = make(), make(batch_first=False)
    expected, weights = attention(*operands, key_padding_mask=PADDING)
    swapped = [jnp.swapaxes(x, 0, 1) for x in operands]
    found, same_weights = first(*swapped, key_padding_mask=PADDING)
    np.testing.assert_allclose(jnp.swapaxes(found, 0, 1), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(same_weights, weights, rtol=1e-6)
    alone, its_weights = attention(*(x[0] for x in operands), key_padding_mask=PADDING[0])
    np.testing.assert_allclose(alone, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(its_weights, weights[0], rtol=1e-5)


def test_weights_are_means_over_heads_unless_asked_apart(operands):
    attention = make()
    (_, mean), (_, each) = (
        attention(*operands, average_attn_weights=average) for average in (True, False)
    )
    assert each.shape == (B, N, T, S)
    np.testing.assert_allclose(each.mean(1), mean, rtol=1e-6)
    assert attention(*operands, need_weights=False)[1] is None


@pytest.mark.parametrize("widths", [{}, {"kdim": 5}, {"vdim": 7}])
def test_projections_begin_with_pytorchs_bounds(widths):
    attention = nn.TorchMultiheadAttention(60, 3, add_bias_kv=True, rngs=nnx.Rngs(0), **widths)
    inner = attention.attention
    for linear in inner.query, inner.key, inner.value:
        fan = sum(linear.kernel.shape) if widths else 4 * 60
        largest = np.abs(linear.kernel[...]).max()
        assert 0.95 < largest / (6 / fan) ** 0.5 <= 1
        assert not linear.bias[...].any()
    assert 0.95 < np.abs(inner.out.kernel[...]).max() / 60**-0.5 <= 1
    assert 0.6 < np.std(attention.bias_k[...]) / 60**-0.5 < 1.4


WRONG = {
    "mask of integers": (TypeError, "attn_mask must be boolean or floating point", (), LATER + 0),
    "mask of bytes": (TypeError, "got uint8", (), LATER.astype(np.uint8)),
    "mask of other sizes": (
        ValueError,
        r"attn_mask must have shape \(5, 7\) or \(9, 5, 7\)",
        (),
        LATER.T,
    ),
    "mask of one example": (ValueError, "attn_mask must have shape", (), LATER[None]),
    "key of another batch": (ValueError, r"key must be \[B, S, kdim\] with B = 3", (1,), None),
    "key of another rank": (ValueError, r"key must be \[B, S, kdim\]", (1, "rank"), None),
}


@pytest.mark.parametrize(("error", "match", "broken", "mask"), WRONG.values(), ids=WRONG)
def test_bad_input_is_named(operands, error, match, broken, mask):
    for index in broken[:1]:
        operands[index] = operands[index][0] if "rank" in broken else operands[index][:2]
    with pytest.raises(error, match=match):
        make()(*operands, attn_mask=mask)


def test_padding_of_other_sizes_is_named(operands):
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(3, 7\)"):
        make()(*operands, key_padding_mask=PADDING[0])


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match=r"in_features \(12\) must be a multiple of num_heads"):
        nn.TorchMultiheadAttention(12, 5, rngs=nnx.Rngs(0))


def attended(mask, modifier):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, N, 4)), jnp.float32)
    return jattn.attend(x[:, :T], x, x, mask=mask, modifier=modifier)


def test_true_hides_in_a_mask_of_pytorchs_layers():
    expected = attended(masks.causal() & masks.padding(np.array([3, 7, 5])), None)
    found = attended(*interop.torch_masks(LATER, PADDING))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_float_mask_is_added_and_minus_infinity_hides():
    mask, modifier = interop.torch_masks(np.where(LATER, -np.inf, 0.0))
    assert modifier is None
    np.testing.assert_allclose(attended(mask, None), attended(masks.causal(), None), rtol=1e-6)
    ones = np.where(PADDING, 1.0, 0.0).astype(np.float32)
    found = attended(*interop.torch_masks(key_padding_mask=ones))
    expected = attended(None, jattn.modifiers.bias(ones[:, None, None]))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_masks_may_be_traced(rng):
    added = np.where(rng.random((B * N, T, S)) < 0.3, -np.inf, rng.normal(size=(B * N, T, S)))
    added = added.astype(np.float32)

    def found(mask):
        return attended(*interop.torch_masks(mask, PADDING, num_heads=N))

    np.testing.assert_allclose(jax.jit(found)(added), found(added), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda mask: found(mask).sum())(added)
    assert np.isfinite(gradient).all() and not gradient[np.isneginf(added)].any()


def test_masks_of_pytorch_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="needs num_heads"):
        interop.torch_masks(np.zeros((6, T, S), bool))
    with pytest.raises(ValueError, match=r"first axis of attn_mask \(7\) must be a multiple"):
        interop.torch_masks(np.zeros((7, T, S), bool), num_heads=N)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[B, S\] or \[S\]"):
        interop.torch_masks(key_padding_mask=np.zeros((2, T, S), bool))
    with pytest.raises(TypeError, match=r"use modifiers.bias .* interop.torch_masks"):
        attended(jnp.where(LATER, -jnp.inf, 0.0), None)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


FORMS = {
    "plain": {},
    "no bias": {"bias": False},
    "learned key and value": {"add_bias_kv": True},
    "learned, then zero, no bias": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
    "widths": {"kdim": 4, "vdim": 6, "add_bias_kv": True},
    "one width": {"vdim": 6, "batch_first": True},
}


@pytest.mark.torch
def test_a_mask_of_pytorch_is_told_from_ours(torch):
    for mask in (torch.from_numpy(LATER), torch.zeros(T, S)):
        with pytest.raises(TypeError, match=r"interop.torch_masks for a mask of PyTorch's layers"):
            attended(mask, None)
    np.testing.assert_array_equal(
        attended(*interop.torch_masks(torch.from_numpy(LATER))), attended(masks.causal(), None)
    )


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_numbers_are_pytorchs_for_every_pair_of_masks(torch, x64, rng, options):
    theirs = torch.nn.MultiheadAttention(E, N, **options).double()
    ours = nn.TorchMultiheadAttention(E, N, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    state = theirs.state_dict()
    interop.load_torch(ours, state)
    back = interop.to_torch(ours)
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name].numpy()) for name in state)

    widths = E, options.get("kdim", E), options.get("vdim", E)
    arrays = [rng.normal(size=(B, n, w)) for n, w in zip((T, S, S), widths, strict=True)]
    if not options.get("batch_first"):
        arrays = [np.swapaxes(array, 0, 1) for array in arrays]
    some = rng.random((B * N, T, S)) < 0.3
    some[..., 0] = False
    of_scores = [None, LATER, rng.normal(size=(T, S)), some, rng.normal(size=(B * N, T, S))]
    of_keys = [None, PADDING, rng.normal(size=(B, S))]

    def tensor(array):
        return None if array is None else torch.from_numpy(array)

    for attn_mask, padding, average in itertools.product(of_scores, of_keys, (True, False)):
        expected = theirs(
            *map(tensor, arrays),
            attn_mask=tensor(attn_mask),
            key_padding_mask=tensor(padding),
            average_attn_weights=average,
        )
        found = ours(
            *arrays,
            attn_mask=attn_mask,
            key_padding_mask=padding,
            average_attn_weights=average,
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-9, atol=1e-12)
