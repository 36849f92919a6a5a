"""A causal language model of the Llama family: in one pass, and in chunks with a cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jattn.interop.huggingface.causal_lm import FREE
from jattn.models import causal_lm
from jattn.parity.system import Arguments, Arrays, System, rope_of

Array = jax.Array


def model_of(arguments: Arguments, dtype: Any) -> nnx.Module:
    """From its config."""
    sizes = {name: value for name, value in arguments.items() if name != "chunks"}
    if "rope" in sizes:
        sizes["rope"] = rope_of(sizes["rope"])
    return causal_lm.CausalLM(causal_lm.Config(**sizes), param_dtype=dtype, rngs=nnx.Rngs(0))


def predict(model: Any, inputs: Arrays, _arguments: Arguments) -> dict[str, Array]:
    """The logits of all tokens at once."""
    return {"logits": model(inputs["tokens"], positions=inputs.get("positions"))}


def decode(model: Any, inputs: Arrays, arguments: Arguments) -> dict[str, Array]:
    """The logits chunk by chunk; the first chunk may be padded, where they become 0."""
    tokens, lengths = inputs["tokens"], inputs.get("lengths")
    (B, T), chunks = tokens.shape, arguments["chunks"]
    cache = model.empty_cache(B, T)
    options: dict[str, Any] = {"rope_length": T} if model.config.rope.depends_on_length else {}
    logits: list[Array] = []
    for chunk in jnp.split(tokens, np.cumsum(chunks)[:-1], axis=-1):
        after, cache = model(chunk, cache=cache, lengths=lengths, **options)
        if lengths is not None:
            is_real = jnp.arange(chunk.shape[-1]) < jnp.asarray(lengths)[:, None]
            after, lengths = jnp.where(is_real[..., None], after, 0), None
        logits.append(after)
    return {"logits": jnp.concatenate(logits, axis=-2)}


LLAMA: dict[str, Any] = {
    "functions": ("jattn.attend", "jattn.positions.rotary"),
    "modules": ("jattn.models.CausalLM",),
    "paper": "Touvron et al. 2023",
    "link": "https://arxiv.org/abs/2307.09288",
    "build": model_of,
    # A tied table stands once among PyTorch's parameters
    "rules": FREE,
}
SYSTEMS = (
    System(
        "causal_lm/model",
        38,
        "causal language model",
        reference="causal_lm.CausalLM",
        call=predict,
        note="Llama, Mistral, Qwen2 and Qwen3 are values of its config",
        **LLAMA,
    ),
    System(
        "causal_lm/decode",
        38,
        "causal language model with a cache",
        reference="causal_lm.Decoder",
        call=decode,
        note="a prompt, then token by token: the logits of one pass",
        **LLAMA,
    ),
)
