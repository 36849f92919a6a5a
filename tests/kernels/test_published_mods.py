"""The mods that FlexAttention's papers and examples publish run as they are.

But for `torch.` read as `jnp.`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.kernels.blockwise import sizes
from tests import oracle

N, T = 3, 13
MASKS = ["sliding_window_causal", "prefix_lm", "document_causal", "dilated_sliding_window"]
MODIFIERS = ["alibi", "tanh_softcap", "learned_table"]


def published():
    """name -> mod, with the arrays that they capture as users capture them."""
    prefix_length = jnp.array([2, 5])
    document_id = jnp.repeat(jnp.array([0, 1, 2]), jnp.array([4, 6, 3]), total_repeat_length=T)
    table = jnp.sin(jnp.arange(N * 17.0)).reshape(N, 17)
    SLIDING_WINDOW, SOFTCAP, DILATION = 3, 2, 2

    def sliding_window_causal(b, h, q_idx, kv_idx):
        causal_mask = q_idx >= kv_idx
        window_mask = q_idx - kv_idx <= SLIDING_WINDOW
        return causal_mask & window_mask

    def prefix_lm(b, h, q_idx, kv_idx):
        return (kv_idx <= prefix_length[b]) | (q_idx >= kv_idx)

    def document_causal(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (document_id[q_idx] == document_id[kv_idx])

    def dilated_sliding_window(b, h, q_idx, kv_idx):
        diff = jnp.abs(q_idx - kv_idx)
        return (diff <= 2 * SLIDING_WINDOW) & (diff % DILATION == 0)

    def alibi(score, b, h, q_idx, kv_idx):
        scale = jnp.exp2(-((h + 1) * 8.0 / N))
        return score + (kv_idx - q_idx) * scale

    def tanh_softcap(score, b, h, q_idx, kv_idx):
        return SOFTCAP * jnp.tanh(score / SOFTCAP)

    def learned_table(score, b, h, q_idx, kv_idx):
        return score + table[h, jnp.clip(q_idx - kv_idx + 8, 0, 16)]

    return {name: mod for name, mod in locals().items() if name in MASKS + MODIFIERS}


@pytest.mark.parametrize(
    ("mask", "modifier"), [*zip(MASKS, [*MODIFIERS, None], strict=True), ("prefix_lm", "alibi")]
)
def test_published_mods_run_block_by_block(mask, modifier, monkeypatch, rng, x64):
    monkeypatch.setattr(sizes, "ROWS", 4)
    monkeypatch.setattr(sizes, "COLUMNS", (4, 4))
    arrays = [rng.standard_normal((2, T, N, 5)) for _ in range(3)]
    with jax.numpy_dtype_promotion("standard"):  # they mix integers and floats, as users do
        mods = published()
        options = {
            "mask": mods[mask],
            "modifier": mods.get(modifier),
            "implementation": "blockwise",
        }
        came = jax.jit(lambda *arrays: jattn.attend(*arrays, **options))(*arrays)
        truth, _, _ = oracle.attend(
            *arrays,
            score=oracle.scaled_dot_product,
            allowed=mods[mask],
            modify=modifier and (lambda *entry: float(mods[modifier](*entry))),
        )
    np.testing.assert_allclose(came, truth, rtol=1e-10, atol=1e-12)
