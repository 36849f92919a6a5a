"""Time a causal language model against Flax's attention and PyTorch, as ratios with their spread.

Claim: a training step is no slower than with Flax's own attention, in memory that is linear in the
length; greedy decoding with a cache is faster than `transformers.generate`; and one query reads a
long cache at half of the machine's memory bandwidth or more, where many heads have keys. The goals,
1.2 times PyTorch's time for a step and a third of it for decoding, depend on the machine, and the
latter is not reached: `docs/speed.md` has the numbers.

Each round gives everyone one turn. PyTorch's model is LlamaForCausalLM of `transformers`, with the
same weights and its fastest attention for CPUs (sdpa). A step is forward, backward and Adam.
"""

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments import BadInput, exits_on_bad_input
from experiments.benchmarks.timing import Run, check_torch, machine, measure, ratio
from experiments.training.command import check_at_least
from jattn import attend, masks
from jattn.interop import to_torch
from jattn.interop.huggingface.config import write_config
from jattn.models import CausalLM
from jattn.models.causal_lm import Config
from jattn.models.tokens import cross_entropy
from jattn.nn import KeyValueCache

VOCABULARY, LENGTHS, H = 1024, (1024, 2048, 4096), 64


@dataclass(frozen=True)
class Settings:
    """Time training, decoding and the reading of a cache."""

    rounds: int = 5
    """Turns of each contender."""
    layers: int = 6
    """Layers of the model."""
    features: int = 384
    """Width of the model: a multiple of 64, the width of a head."""
    batch: int = 8
    """Examples of a training step."""
    length: int = 512
    """Tokens of each, and of a prompt with what follows it."""
    slots: int = 4096
    """Keys in the long cache."""

    def __post_init__(self) -> None:
        check_at_least(self, rounds=1, layers=1, features=64, batch=1, length=8, slots=1)
        if self.features % H:
            raise BadInput(f"--features must be a multiple of {H}, got {self.features}")

    def config(self, **changes: Any) -> Config:
        """The sizes of the model."""
        D, N = self.features, self.features // H
        sizes: dict[str, Any] = {
            "features": D, "num_layers": self.layers, "num_heads": N, "head_features": H,
            "mlp_features": 4 * D,
        }  # fmt: skip
        return Config(VOCABULARY, **sizes | changes)


def flax_attention(query: Any, key: Any, value: Any, *, mask: masks.Mask, **_: Any) -> jax.Array:
    """What Flax's modules call, under a mask that it gets as an array."""
    allowed = mask.to_array(query.shape[-3], key.shape[-3])
    return nnx.dot_product_attention(query, key, value, mask=allowed[None, None])


def training_step(model: CausalLM, tokens: jax.Array) -> tuple[Any, Any]:
    """A function that trains a model by one step, and its first state."""
    graph, state = nnx.split((model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)))

    def loss_of(model: CausalLM) -> jax.Array:
        return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])

    def step(state: Any) -> Any:
        model, optimizer = nnx.merge(graph, state)
        value, gradients = nnx.value_and_grad(loss_of)(model)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
            optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    return jax.jit(step, donate_argnums=0), state


def repeated(step: Any, state: Any) -> Run:
    """A function that takes one step after another, and gives the state's memory back."""
    held = [state]

    def run() -> None:
        held[0], _ = jax.block_until_ready(step(held[0]))

    return run


def torch_model(model: CausalLM) -> Any:
    """The same model in `transformers`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = write_config(model.config, "LlamaForCausalLM", dtype="float32")
    theirs = LlamaForCausalLM._from_config(LlamaConfig(**config), attn_implementation="sdpa")
    weights = {name: torch.from_numpy(array) for name, array in to_torch(model).items()}
    theirs.load_state_dict(weights)
    return theirs


def torch_step(model: Any, tokens: np.ndarray) -> Run:
    """A function that trains a model of PyTorch by one step."""
    import torch

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    given = torch.from_numpy(tokens)

    def run() -> None:
        optimizer.zero_grad()
        logits = model(given[:, :-1], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten())
        losses.backward()
        optimizer.step()

    return run


def training(settings: Settings) -> dict[str, Run]:
    """Name of each contender → a function that takes one training step."""
    shape = settings.batch, settings.length + 1
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape)
    runs = {
        name: repeated(*training_step(_made(settings.config(), attend), jnp.asarray(tokens)))
        for name, attend in (("jattn", attend), ("Flax", flax_attention))
    }
    return runs | {"PyTorch": torch_step(torch_model(_made(settings.config())).train(), tokens)}


def _made(config: Config, attend: Any = attend) -> CausalLM:
    return CausalLM(config, attend=attend, rngs=nnx.Rngs(0))


def step_memory(settings: Settings) -> dict[str, list[int]]:
    """Name of each contender → bytes beside its arguments that a step of one layer needs."""
    found: dict[str, list[int]] = {}
    for name, attention in (("jattn", attend), ("Flax", flax_attention)):
        for length in LENGTHS:
            model = _made(settings.config(num_layers=1), attention)
            step, state = training_step(model, jnp.zeros((1, length + 1), jnp.int32))
            memory = step.lower(state).compile().memory_analysis()
            found.setdefault(name, []).append(memory.temp_size_in_bytes)
    return found


def decoding(settings: Settings, batch: int) -> dict[str, Run]:
    """Name of each contender → a function that continues a batch of prompts greedily."""
    import torch

    model = _made(settings.config(num_kv_heads=1 if settings.features // H % 2 else 2))
    theirs, new = torch_model(model).eval(), settings.length // 2
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (batch, settings.length - new))
    tokens, given = jnp.asarray(prompts), torch.from_numpy(prompts)
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}

    def generate() -> Any:
        with torch.no_grad():
            mask = torch.ones_like(given)
            return theirs.generate(given, attention_mask=mask, pad_token_id=0, **options)

    return {
        "jattn": lambda: jax.block_until_ready(model.generate(tokens, max_new_tokens=new)),
        "PyTorch": generate,
    }


def reading(settings: Settings) -> dict[str, tuple[Run, int]]:
    """Name → a function that reads a cache for one query of eight examples, and its bytes."""
    B, S, N = 8, settings.slots, 8
    found: dict[str, tuple[Run, int]] = {}
    for K in (8, 2):
        keys, values = (
            jnp.asarray(np.random.default_rng(K).normal(size=shape), jnp.float32)
            for shape in ((B, K, H, S), (B, K, S, H))
        )
        cache = KeyValueCache(keys, values, jnp.full(B, S, jnp.int32))
        query, size = jnp.ones((B, 1, N, H)), 2 * cache.keys.nbytes
        many = jnp.concatenate([keys.ravel(), values.ravel()])
        found[f"attend, N 8, K {K}"] = functools.partial(_ended, _attended, query, cache), size
        found[f"sum of all keys and values, K {K}"] = functools.partial(_ended, _sum, many), size
    return found


def _ended(function: Any, *arrays: Any) -> Any:
    return jax.block_until_ready(function(*arrays))


@jax.jit
def _attended(query: jax.Array, cache: KeyValueCache) -> jax.Array:
    positions = cache.length[:, None] - 1, jnp.arange(cache.capacity, dtype=jnp.int32)
    mask = masks.causal() & cache.mask
    return attend(query, cache.key, cache.value, mask=mask, positions=positions)


@jax.jit
def _sum(array: jax.Array) -> jax.Array:
    return array.sum()


def times_table(settings: Settings) -> Table:
    """Training and decoding."""
    new = settings.length // 2
    sizes = f"{settings.layers} layers, D {settings.features}"
    works = {f"training step, {sizes}, T {settings.length}, B {settings.batch}": training(settings)}
    for batch in (1, 8):
        works[f"greedy decoding, {new} tokens, B {batch}"] = decoding(settings, batch)
    table = Table(
        "work", "milliseconds", "Flax", "PyTorch", title="time of each over the time of jattn"
    )
    for work, runs in works.items():
        seconds = measure(runs, settings.rounds)
        others = [
            ratio(seconds[name], seconds["jattn"]) if name in seconds else ""
            for name in ("Flax", "PyTorch")
        ]
        table.add_row(work, f"{1e3 * statistics.median(seconds['jattn']):.1f}", *others)
    return table


def memory_table(settings: Settings) -> Table:
    """Memory of a step against the length."""
    table = Table("attention", *(f"T {n}" for n in LENGTHS), title="MB of a step, one layer, B 1")
    for name, sizes in step_memory(settings).items():
        table.add_row(name, *(f"{size / 1e6:.0f}" for size in sizes))
    return table


def reading_table(settings: Settings) -> Table:
    """How fast one query reads a cache."""
    table = Table(
        "one query, B 8", "milliseconds", "GB/s", title=f"a cache of {settings.slots} keys"
    )
    works = reading(settings)
    seconds = measure({name: run for name, (run, _) in works.items()}, settings.rounds)
    for name, times in seconds.items():
        median, size = statistics.median(times), works[name][1]
        table.add_row(name, f"{1e3 * median:.2f}", f"{size / median / 1e9:.1f}")
    return table


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: time everyone and print the tables."""
    settings = tyro.cli(
        Settings,
        args=arguments,
        prog="python -m experiments.benchmarks.causal_lm",
        description=__doc__,
    )
    check_torch()
    console = Console(width=140)
    for table in (reading_table, times_table, memory_table):
        console.print(table(settings))
    console.print(f"{machine()}, float32")


if __name__ == "__main__":
    main()
