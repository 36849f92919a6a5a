"""Train a language model three ways, convert one into another, and let them write.

Multi-head attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), multi-query attention
(Shazeer 2019, https://arxiv.org/abs/1911.02150), and grouped-query attention between them (Ainslie
et al. 2023, https://arxiv.org/abs/2305.13245), which also says how to convert a trained model.

Claim: on the documentation of Python, in less than ten minutes on two cores, the fewer heads of
keys the worse the loss, but little; the caches are as 8 to 2 to 1, and the smaller the cache the
faster the model writes after a long text. The mean of its heads turns the first model into one like
the second; a tenth of the training makes good most of what that costs.
"""

import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from experiments import BadInput, exits_on_bad_input
from experiments.data import bytepair, documents, packing
from experiments.data.documents import Document
from experiments.data.packing import Rows
from experiments.training import command, pictures, text_command, transformer_command
from experiments.training.accumulation import Sum, cross_entropies
from experiments.training.checkpoints import Checkpoint, restore
from experiments.training.command import Job
from experiments.training.loop import Recipe
from experiments.training.runs import Run
from experiments.training.transformer_command import Corpus
from jattn import attend, interop, masks, nn
from jattn.models import causal_lm
from jattn.models.pretraining import IGNORED

Models = Mapping[str, causal_lm.CausalLM]
STAGES = ("multi-head", "grouped-query", "multi-query")
WATCH = 100  # steps between evaluations
EVALUATION_BATCH = 16
LONGEST = 48  # characters of the beginning of samples
LONG, AT_ONCE, WRITTEN, ROUNDS = 1024, 16, 128, 5  # of the measurement of decoding
WAYS: Mapping[str, Mapping[str, float]] = {
    "greedy": {},
    "temperature 0.8": {"temperature": 0.8},
    "the 20 likeliest (top-k)": {"temperature": 0.8, "top_k": 20},
    "the likeliest 90 % (top-p)": {"temperature": 0.8, "top_p": 0.9},
    "a tenth as likely as the likeliest (min-p)": {"temperature": 0.8, "min_p": 0.1},
    "greedy, but what is written less likely": {"repetition_penalty": 1.3},
}


@dataclass(frozen=True)
class Settings(transformer_command.TransformerSettings):
    """Train a language model with multi-head, grouped-query and multi-query attention."""

    experiment: ClassVar[str] = "language_model"
    stages: ClassVar[tuple[str, ...]] = STAGES
    asks: ClassVar[str] = "prompt"
    free: ClassVar[tuple[str, ...]] = ("model", "temperature", "new_tokens")

    prompt: Annotated[
        str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: train)")
    ] = None
    """Continue this text with the trained checkpoint instead of training."""
    model: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: the newest checkpoint)"),
    ] = None
    """Continue --prompt with a Llama, Mistral or Qwen as `transformers` saves it."""
    new_tokens: int = 60
    """Tokens to write at most, after --prompt or in each sample."""
    temperature: float = 0.8
    """The higher, the less likely tokens are drawn after --prompt; 0 takes the likeliest."""
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 3e-3
    groups: int = 2
    """Key/value heads of grouped-query attention; they divide --heads."""
    packed: bool = False
    """Train on pieces of documents, several in a row, of which none sees another."""

    def __post_init__(self) -> None:
        self._check_meaning()
        super().__post_init__()
        command.check_at_least(self, groups=1, new_tokens=1, temperature=0)
        trains = self.prompt is None
        if trains and not any(self.heads % count == 0 for count in range(2, self.heads)):
            raise BadInput(
                f"--heads must be no prime number, for groups share them, got {self.heads}"
            )
        if trains and (self.heads % self.groups or self.groups in (1, self.heads)):
            raise BadInput(
                f"--groups must divide --heads {self.heads} and be neither 1 nor all, which are"
                f" multi-query and multi-head attention, got {self.groups}"
            )
        if not math.isfinite(self.temperature):
            raise BadInput(f"--temperature must be finite, got {self.temperature}")
        text_command.check_utf8("prompt", self.prompt or "")

    def _check_meaning(self) -> None:
        """Refuse options that mean nothing beside others."""
        if self.model and self.prompt is None:
            raise BadInput("--model continues a text: give it by --prompt")
        changed = {each.name for each in fields(self) if getattr(self, each.name) != each.default}
        if self.prompt is None and "temperature" in changed:
            raise BadInput("--temperature is for --prompt: samples are drawn in every way")
        meaning = {"prompt", "model", "new_tokens", "temperature", "seed"}
        if self.model and (others := sorted(changed - meaning)):
            raise BadInput(f"{command.option(others[0])} means nothing with --model")

    @property
    def asked(self) -> str | None:
        """The text that the trained checkpoint is given; None: train, or a model of a folder."""
        return None if self.model else self.prompt

    def check_continues(self, before: Self, folder: Path, *, finished: bool) -> None:
        """Refuse other settings than the checkpoint's; a prompt may be drawn by another seed."""
        before = replace(before, seed=self.seed) if self.prompt is not None else before
        super().check_continues(before, folder, finished=finished)

    def kv_heads(self, stage: str) -> int:
        """The key/value heads of a model."""
        return {"multi-head": self.heads, "multi-query": 1}.get(stage, self.groups)


class Batches:
    """Training batches: `batches(step)` yields those of `step`, `step + 1`, …

    In each epoch the stream is cut elsewhere, and rows come in another order; the seed and the
    number of the step decide.
    """

    def __init__(self, documents: Sequence[Sequence[int]], settings: Settings):
        self.documents, self.settings, self.size = documents, settings, settings.batch_size
        self.packed = packing.packed(documents, settings.length) if settings.packed else None
        self.per_epoch = max(1, len(self._rows(settings.length - 1).tokens) // self.size)

    def __call__(self, step: int) -> Iterator[Rows]:
        """Endless batches, starting with the one of `step`, which counts from 0."""
        epoch, first = divmod(step, self.per_epoch)
        while True:
            random = np.random.default_rng((self.settings.seed, epoch))
            rows = self._rows(int(random.integers(self.settings.length)))
            order = random.permutation(len(rows.tokens))
            order = np.resize(order, max(len(order), self.size))
            for i in range(first, self.per_epoch):
                yield rows.take(order[i * self.size : (i + 1) * self.size])
            epoch, first = epoch + 1, 0

    def _rows(self, offset: int) -> Rows:
        if self.packed:
            return self.packed
        length, total = self.settings.length, sum(len(each) + 1 for each in self.documents)
        return packing.windows(self.documents, length, min(offset, max(total - length, 0)))


def encode(tokenizer: Tokenizer, part: Sequence[Document]) -> list[list[int]]:
    """The ids of each document."""
    return [each.ids for each in tokenizer.encode_batch(["\n\n".join(text) for text in part])]


def build(settings: Settings, vocabulary: int, stage: str) -> causal_lm.CausalLM:
    """An untrained model."""
    config = causal_lm.Config(
        vocabulary, settings.features, settings.layers, settings.heads, settings.kv_heads(stage),
        mlp_features=3 * settings.features, tied=True, max_length=settings.length,
        stop=(packing.END,),
    )  # fmt: skip
    rngs = nnx.Rngs(settings.seed)
    return causal_lm.CausalLM(config, dtype=settings.dtype, rngs=rngs)


def loss(model: causal_lm.CausalLM, batch: Any) -> list[Sum]:
    """Negative log-likelihood of what follows; the batch is traced `Rows`."""
    options: dict[str, Any] = {}
    if batch.segments is not None:
        options = {"mask": masks.segments(batch.segments), "positions": batch.positions}
    return [cross_entropies(model(batch.tokens, **options), batch.targets, ignored=IGNORED)]


def evaluate(model: causal_lm.CausalLM, rows: Rows) -> float:
    """Mean negative log-likelihood in nats a token."""
    total = number = 0.0
    size = min(EVALUATION_BATCH, len(rows.tokens))
    for start in range(0, len(rows.tokens), size):
        chosen = np.arange(start, start + size)
        batch = rows.take(chosen % len(rows.tokens))
        batch.targets[chosen >= len(rows.tokens)] = IGNORED  # the last batch is filled up
        (part,) = _evaluate(model, batch)
        total, number = total + float(part.total), number + float(part.number)
    return total / number


_evaluate = nnx.jit(loss)


def unigram(train: Sequence[Sequence[int]], test: Rows, vocabulary: int) -> float:
    """The loss of the frequencies of tokens alone, each counted once more."""
    ids = np.concatenate([[*document, packing.END] for document in train])
    counts = np.bincount(ids, minlength=vocabulary) + 1
    targets = test.targets[test.targets != IGNORED]
    return float(-np.log(counts / counts.sum())[targets].mean())


def read(settings: Settings, checkpoint: Checkpoint | None = None) -> Corpus:
    """The documents as ids, and a tokenizer trained on them, or the checkpoint's."""
    parts = transformer_command.load(settings)
    texts = ["\n\n".join(document) for document in parts.train]
    train = functools.partial(bytepair.train, texts, settings.vocabulary)
    tokenizer = transformer_command.tokenizer_of(checkpoint, train)
    return Corpus(parts, tokenizer, *(encode(tokenizer, part) for part in parts))


def fit(job: Job[Settings], corpus: Corpus, batches: Batches) -> Models:
    """Train the three, and convert the first, from the checkpoints on if there are some."""
    settings, vocabulary = job.settings, corpus.tokenizer.get_vocab_size()
    validation = packing.packed(corpus.validation, settings.length)
    known, found = corpus.metadata(), {}

    def seen(model: causal_lm.CausalLM) -> dict[str, float]:
        return {"loss": evaluate(model, validation)}

    def train(stage: str, model: causal_lm.CausalLM, recipe: Recipe) -> causal_lm.CausalLM:
        job.console.print(f"{stage} attention, {model.config.num_kv_heads} key/value heads")
        watch = transformer_command.validating(WATCH, recipe.steps, seen)
        job.stage(stage).train(model, loss, batches, recipe, watch=watch, **known)
        return model

    options = settings.recipe(causal_lm.Block)
    for stage in STAGES:
        model = build(settings, vocabulary, stage)
        recipe = Recipe.adam(job.ends, settings.learning_rate, decay=0.1, **options)
        found[stage] = train(stage, model, recipe)
    found["converted"] = nn.to_grouped_query(found[STAGES[0]], settings.groups)
    recipe = Recipe.adam(
        max(1, settings.steps // 10), settings.learning_rate / 1.5, decay=0.1, **options
    )
    again = nnx.clone(found["converted"])
    found["converted, trained on"] = train(f"converted-{settings.steps}", again, recipe)
    return found


def cache_bytes(model: causal_lm.CausalLM, tokens: int) -> int:
    """The bytes of keys and values of so many tokens."""
    cache = jax.eval_shape(lambda: model.empty_cache(1, tokens))
    leaves = [leaf for leaf in jax.tree.leaves(cache) if leaf.ndim > 2]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@nnx.jit
def _write(model: causal_lm.CausalLM, token: jax.Array, cache: Any) -> jax.Array:
    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        token, cache = carry
        cache, logits = model.step(token, cache)
        token = jnp.argmax(logits, axis=-1).astype(token.dtype)
        return (token, cache), token

    return jax.lax.scan(step, (token, cache), None, length=WRITTEN)[1]


def decode_speed(models: Models) -> dict[str, float]:
    """Tokens a second of 16 texts at once after 1,024 tokens each; the models take turns."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        prompt = jnp.ones((AT_ONCE, LONG), jnp.int32)
        cache = model.empty_cache(AT_ONCE, LONG + WRITTEN)
        _, cache = nnx.jit(lambda model, prompt, cache: model(prompt, cache=cache))(
            model, prompt, cache
        )
        calls[name] = functools.partial(_write, model, prompt[:, 0], cache)
        jax.block_until_ready(calls[name]())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - began)
    return {name: AT_ONCE * WRITTEN / float(np.median(each)) for name, each in seconds.items()}


def scores_of(models: Models, corpus: Corpus, length: int) -> dict[str, Any]:
    """The numbers of the table, of the part that was not looked at."""
    rows = packing.packed(corpus.test, length)
    letters = sum(len(corpus.tokenizer.decode(ids).encode()) for ids in corpus.test)
    tokens = int((rows.targets != IGNORED).sum())
    speed = decode_speed({name: models[name] for name in STAGES})
    found: dict[str, Any] = {}
    for name, model in models.items():
        nats = evaluate(model, rows)
        found[name] = {
            "kv_heads": model.config.num_kv_heads,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
            "loss": nats,
            "bits_per_byte": nats * tokens / letters / np.log(2),
            "cache_bytes": cache_bytes(model, LONG),
            "tokens_per_second": speed.get(name),
        }
    alone = packing.alone(corpus.test, length)
    return {
        "models": found,
        "unigram": unigram(corpus.train, rows, corpus.tokenizer.get_vocab_size()),
        "packed": {"rows": len(rows.tokens), "loss": found[STAGES[0]]["loss"]},
        "alone": {"rows": len(alone.tokens), "loss": evaluate(models[STAGES[0]], alone)},
    }


def stream(
    model: causal_lm.CausalLM, tokenizer: Tokenizer, prompt: str, console: Console, **options: Any
) -> str:
    """Continue a prompt and print it as it comes; the new text.

    Options are those of `models.generation.generate`.
    """
    ids = tokenizer.encode(prompt).ids or [packing.END]
    decoder, text = DecodeStream(skip_special_tokens=True), ""
    console.print(prompt, end="", markup=False, highlight=False, style="bold", soft_wrap=True)
    for tokens in model.stream(jnp.array([ids]), **options):
        new = decoder.step(tokenizer, int(tokens[0])) or ""
        console.print(new, end="", markup=False, highlight=False, soft_wrap=True)
        text += new
    console.print()
    return text


def samples(
    model: causal_lm.CausalLM, corpus: Corpus, console: Console, new_tokens: int, seed: int
) -> None:
    """Continue the first words of a paragraph, up to 48 characters, in every way of decoding."""
    prompt = " ".join(documents.opening(corpus.parts.test).split()[:6])[:LONGEST]
    for way, options in WAYS.items():
        console.rule(way, align="left")
        given: dict[str, Any] = dict(options)
        if "temperature" in options:
            given["key"] = jax.random.key(seed)
        stream(model, corpus.tokenizer, prompt, console, max_new_tokens=new_tokens, **given)
    console.rule()


def attention(model: causal_lm.CausalLM, ids: Sequence[int]) -> list[np.ndarray]:
    """The weights `[N, T, T]` of each layer, of a text.

    They come from a copy whose `attend` notes them down.
    """
    noted: list[np.ndarray] = []

    def noting(*arrays: jax.Array, **options: Any) -> Any:
        output, weights = attend(*arrays, return_weights=True, **options)
        noted.append(np.asarray(weights, np.float32)[0])
        return output

    copy = causal_lm.CausalLM(model.config, attend=noting, rngs=nnx.Rngs(0))
    nnx.update(copy, nnx.state(model))
    copy(jnp.array([ids]))
    return noted


def report(models: Models, corpus: Corpus, job: Job[Settings]) -> None:
    """Score the part that was not looked at; print and draw the results; save the first model."""
    settings, run, console = job.settings, job.run, job.console
    tokenizer, first = corpus.tokenizer, models[STAGES[0]]
    samples(first, corpus, console, settings.new_tokens, settings.seed)
    with console.status("reading the part that was not looked at …"):
        scores = scores_of(models, corpus, settings.length)
    run.write_scores(scores)
    folder = run.folder / "model"
    _save(first, tokenizer, folder)
    _draw(first, corpus, job)
    console.print(_table(scores))
    console.print(
        f"heads: of keys and values; cache: of {LONG:,} tokens of a text, keys and values;\n"
        f"tokens/s: of {AT_ONCE} texts at once, each after {LONG:,} tokens",
        highlight=False,
    )
    alone, packed = scores["alone"], scores["packed"]
    console.print(
        f"the frequencies of tokens alone: {scores['unigram']:.3f} nats a token\n"
        f"loss where each piece of a document has a row of its own: {alone['loss']:.6f},"
        f" in {alone['rows']} rows; where pieces share rows: {packed['loss']:.6f},"
        f" in {packed['rows']}\n"
        f"pictures: {run.folder / 'attention.png'}, {run.folder / 'curve.png'}\n"
        f"model: {folder}, which `transformers` and --model can read",
        highlight=False, markup=False,
    )  # fmt: skip


def _save(model: causal_lm.CausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder, in place of that of an earlier report."""
    new = folder.with_name(f"{folder.name}.new")
    for each in (new, folder):
        shutil.rmtree(each, ignore_errors=True)
    interop.save_pretrained(model, new)
    tokenizer.save(str(new / "tokenizer.json"))
    new.rename(folder)


def _draw(first: causal_lm.CausalLM, corpus: Corpus, job: Job[Settings]) -> None:
    """Draw the losses, and where the heads of the first model look."""
    run, steps = job.run, job.settings.steps
    metrics = {stage: Run(run.folder / stage).metrics.read() for stage in STAGES}
    converted = Run(run.folder / f"converted-{steps}").metrics.read()
    metrics["converted, trained on"] = [{**row, "step": row["step"] + steps} for row in converted]
    pictures.curves(metrics, run.folder / "curve.png")
    text = corpus.tokenizer.encode(documents.opening(corpus.parts.test)).ids
    ids = [packing.END, *text][: min(24, job.settings.length)]
    tokens = ["END", *(corpus.tokenizer.decode([id]) for id in ids[1:])]
    maps, path = attention(first, ids), run.folder / "attention.png"
    pictures.attention_maps(maps, tokens, path, title=f"{STAGES[0]} attention")


def _table(scores: Mapping[str, Any]) -> Table:
    table = Table(title="documents that training never saw")
    table.add_column("attention", no_wrap=True)
    for name in ("heads", "weights", "nats/token", "cache", "tokens/s"):
        table.add_column(name, justify="right")
    for name, row in scores["models"].items():
        speed = row["tokens_per_second"]
        table.add_row(
            name, str(row["kv_heads"]), f"{row['parameters']:,}", f"{row['loss']:.3f}",
            f"{row['cache_bytes'] / 1024:,.0f} KiB", f"{speed:,.0f}" if speed else "",
        )  # fmt: skip
    return table


def continue_prompt(
    model: causal_lm.CausalLM, tokenizer: Tokenizer, settings: Settings, console: Console
) -> None:
    """Write on from the text of `--prompt`."""
    options: dict[str, Any] = {"max_new_tokens": settings.new_tokens}
    if settings.temperature:
        key = jax.random.key(settings.seed)
        options |= {"temperature": settings.temperature, "key": key}
    stream(model, tokenizer, settings.prompt or "", console, **options)


def of_folder(folder: Path) -> tuple[causal_lm.CausalLM, Tokenizer]:
    """The model and the tokenizer of a folder.

    Raises:
      BadInput: it has no such model, or no tokenizer.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder")
    tokenizer = bytepair.load(folder)
    try:
        return interop.load_pretrained(folder, causal_lm.CausalLM), tokenizer
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(str(error)) from None


def of_checkpoint(
    settings: Settings, checkpoint: Checkpoint
) -> tuple[causal_lm.CausalLM, Tokenizer]:
    """The multi-head model of a checkpoint, and its tokenizer."""
    text_command.check_trained(settings, checkpoint)
    tokenizer = Tokenizer.from_str(checkpoint.metadata["tokenizer"])
    model = build(settings, tokenizer.get_vocab_size(), STAGES[0])
    restore(model, checkpoint)
    return model, tokenizer


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    job = Job.parse(Settings(), arguments)
    settings = job.settings
    transformer_command.before_jax_starts(settings)
    if settings.prompt is not None:
        if settings.model:
            model, tokenizer = of_folder(settings.model)
        elif job.checkpoint:
            model, tokenizer = of_checkpoint(settings, job.checkpoint)
        continue_prompt(model, tokenizer, settings, job.console)
        return
    with job.console.status("reading the text, training the tokenizer …"):
        corpus = read(settings, job.checkpoint)
        batches = Batches(corpus.train, settings)
    text_command.check_data(corpus.parts, job.checkpoint, "documents")
    job.announce(corpus.describe())
    report(fit(job, corpus, batches), corpus, job)
    job.finish()


if __name__ == "__main__":
    main()
