"""Train a translator with attention and show where it looks.

Three models: Bahdanau's (2015, https://arxiv.org/abs/1409.0473), Luong's (2015,
https://arxiv.org/abs/1508.04025) and a Transformer (2017, https://arxiv.org/abs/1706.03762).

Claim: in a few minutes on a laptop, each model learns to read dates in eighteen languages and
five scripts, and writes at least 99 % of the dates that training does not contain correctly.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sacrebleu.metrics.chrf import CHRF

from experiments import BadInput, exits_on_bad_input
from experiments.data import dates, pairs
from experiments.data.batches import Batches, Vocabulary, fixed_batches
from experiments.data.pairs import Pair, Split
from experiments.training import command, pictures, text_command
from experiments.training.checkpoints import Checkpoint, restore
from experiments.training.command import Job
from experiments.training.loop import Recipe
from experiments.training.runs import Run
from jattn.models import bahdanau, luong, transformer
from jattn.models.encoder_decoder import EncoderDecoder
from jattn.models.tokens import cross_entropy

EVALUATION_BATCH = 256
HEADS = 4  # of the transformer
# Languages in the picture of the dates
SHOWN = ("en", "de", "es", "fi", "ru", "el", "ja", "zh", "ko")


@dataclass(frozen=True)
class Settings(text_command.TextSettings):
    """Train a translator with attention; without options: dates in 18 languages to ISO 8601."""

    experiment: ClassVar[str] = "translate"
    asks: ClassVar[str] = "translate"
    free: ClassVar[tuple[str, ...]] = ("beam",)

    data: text_command.DataFile = None
    """Train on your own UTF-8 lines of source<TAB>target. A tenth of the sources is held out."""
    translate: Annotated[
        str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: train)")
    ] = None
    """Translate this text with the trained checkpoint instead of training."""
    model: Literal["bahdanau", "luong", "transformer"] = "bahdanau"
    """bahdanau: additive attention on GRUs; luong: multiplicative on LSTMs, with input feeding;
    transformer: two layers on each side, normalised first, with four heads."""
    steps: int = 1000
    learning_rate: float = 4e-3
    dropout: float = 0.0
    """Fraction dropped in training.
    bahdanau: of attention weights; luong: of the decoder's outputs;
    transformer: wherever the paper drops."""
    beam: int = 1
    """Hypotheses that beam search keeps; 1 is greedy decoding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        command.check_at_least(self, beam=1)
        command.check_fraction(self, "dropout")
        if self.model == "transformer" and self.features % HEADS:
            raise BadInput(f"--features must be a multiple of {HEADS}, got {self.features}")


@dataclass(frozen=True)
class Translator:
    """A model, and the characters that it reads and writes."""

    model: EncoderDecoder
    source: Vocabulary
    target: Vocabulary
    max_length: int
    beam: int

    @classmethod
    def build(cls, settings: Settings, characters: dict[str, Any]) -> "Translator":
        """An untrained translator; `characters` comes from `describe`."""
        source, target = Vocabulary(characters["source"]), Vocabulary(characters["target"])
        if settings.beam > len(target):
            raise BadInput(
                f"--beam must be at most the {len(target)} tokens of the target,"
                f" got {settings.beam}"
            )
        model = _model(settings, len(source), len(target))
        return cls(model, source, target, characters["max_length"], settings.beam)

    def __call__(
        self, texts: Sequence[str], *, batch_size: int = EVALUATION_BATCH
    ) -> tuple[list[str], list[np.ndarray]]:
        """Translations, and for each the attention weights [T, S] of its characters."""
        self.model.eval()
        outputs, weights = [], []
        for tokens, lengths, count in fixed_batches(
            [self.source.encode(text) for text in texts], batch_size
        ):
            found, looked = self._decode(jnp.asarray(tokens), jnp.asarray(lengths))
            for row, look in list(zip(np.asarray(found), np.asarray(looked), strict=True))[:count]:
                outputs.append(self.target.decode(row))
                weights.append(look)
        return outputs, weights

    def _decode(self, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        options: dict[str, Any] = {
            "lengths": lengths,
            "max_length": self.max_length,
            "return_weights": True,
        }
        if self.beam == 1:
            found, weights = self.model.greedy(tokens, **options)
            return found.tokens, weights
        found, weights = self.model.beam(tokens, width=self.beam, **options)
        return found.tokens[:, 0], weights[:, 0]


def _model(settings: Settings, source: int, target: int) -> EncoderDecoder:
    """An untrained model for vocabularies of these sizes."""
    F, rngs = settings.features, nnx.Rngs(settings.seed)
    rate: dict[str, Any] = {"dropout_rate": settings.dropout}
    if settings.model == "transformer":
        sizes = transformer.Config(source, target, F, HEADS, 2, 2, 2 * F, norm_first=True, **rate)
        return transformer.TransformerTranslator(sizes, rngs=rngs)
    widths = max(F // 2, 1), F
    if settings.model == "luong":
        return luong.LuongTranslator(luong.Config(source, target, *widths, **rate), rngs=rngs)
    config = bahdanau.Config(source, target, *widths, **rate)
    return bahdanau.BahdanauTranslator(config, rngs=rngs)


def describe(data: Split) -> dict[str, Any]:
    """The training characters, and the most steps that decoding may take."""
    return {
        "source": Vocabulary.of(pair.source for pair in data.train).characters,
        "target": Vocabulary.of(pair.target for pair in data.train).characters,
        "max_length": max(len(pair.target) for pair in data.train) + 1,
    }


def load(settings: Settings) -> Split:
    """The pairs: a file's, or dates."""
    if settings.data is None:
        return dates.dates(num_train=5000, num_test=200, seed=settings.seed)
    return pairs.split(pairs.read_tsv(settings.data), fraction=0.1, seed=settings.seed)


def loss(model: EncoderDecoder, batch: Any) -> jax.Array:
    """Mean negative log-likelihood of a target character or end; the batch is a traced `Batch`."""
    logits = model(batch.source, batch.target_in, lengths=batch.source_lengths)
    return cross_entropy(logits, batch.target_out, lengths=batch.target_lengths)


def fit(job: Job[Settings], data: Split) -> Translator:
    """Train, from the checkpoint on if there is one."""
    settings, characters = job.settings, describe(data)
    with job.console.status("building the model …"):
        translator = Translator.build(settings, characters)
        translator.model.train()
        batches = Batches(
            data.train,
            translator.source,
            translator.target,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
    recipe = Recipe.adam(job.ends, settings.learning_rate)
    job.train(
        translator.model, loss, batches, recipe,
        digest=text_command.digest(data), characters=characters,
    )  # fmt: skip
    return translator


def evaluate(translator: Translator, test: Sequence[Pair]) -> tuple[list[str], dict[str, float]]:
    """Translations of the held-out pairs and their scores, and the scores of a copy of the source.

    Exact match is a fraction of the pairs; chrF2 (https://aclanthology.org/W15-3049) is in percent.
    """
    outputs, _ = translator([pair.source for pair in test])
    targets = [pair.target for pair in test]
    scores: dict[str, float] = {"pairs": len(test)}
    for name, texts in (("", outputs), ("copy_", [pair.source for pair in test])):
        scores[f"{name}exact_match"] = float(
            np.mean([a == b for a, b in zip(texts, targets, strict=True)])
        )
        scores[f"{name}chrf"] = CHRF().corpus_score(texts, [targets]).score
    return outputs, scores


def examples(data: Split, seed: int, count: int = 9) -> list[Pair]:
    """Held-out pairs to show: a long one of each language in `SHOWN`, else a few random ones."""
    draw = random.Random(seed)
    labels = [label for label in SHOWN if any(pair.label == label for pair in data.test)]
    if not labels:
        return draw.sample(data.test, min(count, len(data.test)))
    groups = [[pair for pair in data.test if pair.label == label] for label in labels]
    return [
        max(draw.sample(group, min(7, len(group))), key=lambda pair: len(pair.source))
        for group in groups
    ]


def mistakes(
    test: Sequence[Pair], outputs: Sequence[str], shown: Sequence[Pair], seed: int, count: int = 5
) -> list[tuple[Pair, str]]:
    """A few random pairs with wrong translations, none of those that are shown already."""
    wrong = [
        (pair, output)
        for pair, output in zip(test, outputs, strict=True)
        if output != pair.target and pair not in shown
    ]
    return random.Random(seed).sample(wrong, min(count, len(wrong)))


def report(translator: Translator, data: Split, run: Run, seed: int, console: Console) -> None:
    """Score the held-out pairs; print and draw the results."""
    with console.status("translating the held-out pairs …"):
        outputs, scores = evaluate(translator, data.test)
    run.write_scores(scores)

    shown = examples(data, seed)
    written, weights = translator([pair.source for pair in shown])
    console.print(_table("held-out examples", list(zip(shown, written, strict=True))))
    if wrong := mistakes(data.test, outputs, shown, seed):
        console.print(_table("some of the mistakes", wrong))

    title = f"held out: {scores['exact_match']:.1%} of {len(data.test)} right"
    pictures.curve(run.metrics.read(), run.folder / "curve.png", title=title)
    panels = [
        pictures.Alignment(f"{pair.source} → {output}", pair.source, output, look)
        for pair, output, look in zip(shown, written, weights, strict=True)
    ]
    pictures.alignments(panels, run.folder / "alignment.png")
    console.print(
        f"exact match on {len(data.test)} held-out pairs: {scores['exact_match']:.2%}"
        f" (copying the source: {scores['copy_exact_match']:.2%})\n"
        f"chrF2: {scores['chrf']:.1f} (copying the source: {scores['copy_chrf']:.1f})\n"
        f"pictures: {run.folder / 'alignment.png'}, {run.folder / 'curve.png'}",
        highlight=False,
        markup=False,
    )


def _table(title: str, rows: Sequence[tuple[Pair, str]]) -> Table:
    table = Table("", "source", "translation", "expected", "", title=title)
    for pair, output in rows:
        mark = "✓" if output == pair.target else "✗"
        table.add_row(*map(Text, (pair.label, pair.source, output, pair.target, mark)))
    return table


def translate_text(settings: Settings, checkpoint: Checkpoint) -> str:
    """The translation of the text of `--translate`."""
    characters = checkpoint.metadata["characters"]
    text = text_command.asked_text(settings, checkpoint, characters["source"])
    translator = Translator.build(settings, characters)
    restore(translator.model, checkpoint)
    (output,), _ = translator([text], batch_size=1)
    return output


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    job = Job.parse(Settings(), arguments)
    if job.checkpoint and job.settings.translate is not None:
        print(translate_text(job.settings, job.checkpoint))
        return
    with job.console.status("reading the data …"):
        data = load(job.settings)
    text_command.check_data(data, job.checkpoint, "pairs")
    job.announce(f"{len(data.train)} pairs to train on, {len(data.test)} held out")
    translator = fit(job, data)
    report(translator, data, job.run, job.settings.seed, job.console)
    job.finish()


if __name__ == "__main__":
    main()
