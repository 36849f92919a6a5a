"""Recognise the language of a name by attention to its characters, and show which ones decide.

The model is a BiLSTM whose steps a learned query pools (Zhou et al. 2016,
https://aclanthology.org/P16-2034).

Claim: in a few minutes on a laptop, the model learns to tell 34 languages apart, many of them
close, by the names of territories, languages and currencies. It is right for 86 % of the names of
things that training never names. Naive Bayes on counts of 1- to 4-grams is one point better and
takes seconds: texts as few and as short as these need no network. The tests show what attention
adds: it also learns labels that no n-gram determines, and naive Bayes does not.

The split is by the thing named, so training has no translation of a held-out name. A name that
several languages spell alike is in neither part, because no single answer to it is right.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text as Shown

from experiments import exits_on_bad_input
from experiments.data import labelled, names
from experiments.data.batches import Batches, Vocabulary, fixed_batches
from experiments.data.labelled import Labels, Split, Text
from experiments.data.ngrams import NaiveBayes
from experiments.data.pairs import Pair
from experiments.training import class_pictures, command, pictures, text_command
from experiments.training.checkpoints import Checkpoint, restore
from experiments.training.command import Job
from experiments.training.loop import Recipe
from experiments.training.runs import Run
from jattn import nn
from jattn.models import classifier

EVALUATION_BATCH = 256
LIKELY = 3  # labels that --classify prints


@dataclass(frozen=True)
class Settings(text_command.TextSettings):
    """Train a classifier of texts by attention; without options: names in 34 languages."""

    experiment: ClassVar[str] = "classify"
    asks: ClassVar[str] = "classify"

    data: text_command.DataFile = None
    """Train on your own texts: a CSV or TSV file in UTF-8 with a header; a tenth is held out."""
    text_column: str = "text"
    """Column of the file that holds the texts."""
    label_column: str = "label"
    """Column of the file that holds their labels."""
    classify: Annotated[
        str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: train)")
    ] = None
    """Classify this text with the trained checkpoint instead of training."""
    steps: int = 1800
    batch_size: int = 256
    learning_rate: float = 6e-3
    layers: int = 1
    """Recurrent layers in each direction."""
    dropout: float = 0.3
    """Fraction of the input of each layer that is dropped in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        command.check_at_least(self, layers=1)
        command.check_fraction(self, "dropout")


@dataclass(frozen=True)
class Reader:
    """A model, the characters that it reads, and its labels."""

    model: classifier.Classifier
    characters: Vocabulary
    labels: Labels

    @classmethod
    def build(cls, settings: Settings, known: dict[str, Any]) -> "Reader":
        """An untrained reader; `known` comes from `describe`."""
        characters, labels = Vocabulary(known["characters"]), Labels(tuple(known["labels"]))
        config = classifier.Config(
            vocabulary=len(characters),
            classes=len(labels.names),
            embedding_features=max(settings.features // 2, 1),
            hidden_features=settings.features,
            num_layers=settings.layers,
            bidirectional=True,
            dropout_rate=settings.dropout,
            pooling=nn.LearnedQueryPooling,
        )
        return cls(classifier.Classifier(config, rngs=nnx.Rngs(settings.seed)), characters, labels)

    def __call__(
        self, texts: Sequence[str], *, batch_size: int = EVALUATION_BATCH
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """For each text the probabilities of the labels [C] and the weights of its characters."""
        self.model.eval()
        probabilities, weights = [], []
        for tokens, lengths, count in fixed_batches(
            [self.characters.encode(text) for text in texts], batch_size
        ):
            logits, looked = _classify(self.model, jnp.asarray(tokens), jnp.asarray(lengths))
            probabilities.append(np.asarray(jax.nn.softmax(logits))[:count])
            rows = zip(np.asarray(looked)[:count], lengths, strict=False)
            weights += [look[:length] for look, length in rows]
        return np.concatenate(probabilities), weights


@nnx.jit
def _classify(
    model: classifier.Classifier, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return model(tokens, lengths=lengths, return_weights=True)


def describe(data: Split) -> dict[str, Any]:
    """The characters and labels of the training texts, which the size of the model depends on."""
    return {
        "characters": Vocabulary.of(text.text for text in data.train).characters,
        "labels": sorted({text.label for text in data.train}, key=_place),
    }


def _place(label: str) -> tuple[int, str]:
    """Sort key: close languages are neighbours; other labels are in alphabetical order."""
    return (names.LANGUAGES.index(label) if label in names.LANGUAGES else -1, label)


def load(settings: Settings) -> Split:
    """The texts: a file's, or the names of CLDR."""
    if settings.data is None:
        texts = names.names()
    else:
        texts = labelled.read_table(
            settings.data, text_column=settings.text_column, label_column=settings.label_column
        )
    return labelled.split(texts, fraction=0.1, seed=settings.seed)


def loss(model: classifier.Classifier, batch: Any) -> jax.Array:
    """Mean negative log-likelihood of the label, the only target token of a text.

    The batch is a traced `Batch`.
    """
    logits = model(batch.source, lengths=batch.source_lengths)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.target_out[:, 0]).mean()


def fit(job: Job[Settings], data: Split) -> Reader:
    """Train, from the checkpoint on if there is one."""
    settings, known = job.settings, describe(data)
    with job.console.status("building the model …"):
        reader = Reader.build(settings, known)
        reader.model.train()
        batches = Batches(
            [Pair(text.text, text.label) for text in data.train], reader.characters, reader.labels,
            batch_size=settings.batch_size, seed=settings.seed, num_buckets=6,
        )  # fmt: skip
    recipe = Recipe.adam(job.ends, settings.learning_rate)
    job.train(reader.model, loss, batches, recipe, digest=text_command.digest(data), known=known)
    return reader


def evaluate(found: Sequence[str], data: Split) -> dict[str, float]:
    """The fraction of held-out texts with the right label, for the model and for two baselines."""
    (common, _), *_ = Counter(text.label for text in data.train).most_common(1)
    baseline = NaiveBayes(data.train)([text.text for text in data.test])
    answers = {"accuracy": found, "naive_bayes": baseline, "most_common": [common] * len(data.test)}
    truth = [text.label for text in data.test]
    right = {
        name: np.mean([a == b for a, b in zip(labels, truth, strict=True)])
        for name, labels in answers.items()
    }
    return {"texts": len(data.test), **{name: float(share) for name, share in right.items()}}


def report(reader: Reader, data: Split, run: Run, seed: int, console: Console) -> None:
    """Score the held-out texts; print and draw the results."""
    with console.status("classifying the held-out texts …"):
        probabilities, weights = reader([text.text for text in data.test])
        found = [reader.labels.names[index] for index in probabilities.argmax(axis=1)]
        scores = evaluate(found, data)
    run.write_scores(scores)
    title = (
        f"held out: {scores['accuracy']:.1%} of {len(data.test)} texts right,"
        f" naive Bayes {scores['naive_bayes']:.1%}"
    )
    pictures.curve(run.metrics.read(), run.folder / "curve.png", title=title, per="text")
    counts = np.zeros((len(reader.labels.names),) * 2)
    order = [reader.labels.encode(text.label)[0] for text in data.test]
    np.add.at(counts, (order, probabilities.argmax(axis=1)), 1)
    class_pictures.confusion(counts, reader.labels.names, run.folder / "confusion.png", title=title)
    class_pictures.strips(
        [
            class_pictures.Strip(
                _verdict(data.test[i].label, found[i]), data.test[i].text, weights[i]
            )
            for i in examples(data.test, seed)
        ],
        run.folder / "attention.png",
    )
    if scores["accuracy"] < 1:
        console.print(_mistakes(data.test, found))
    drawn = [str(run.folder / f"{name}.png") for name in ("attention", "confusion", "curve")]
    console.print(
        f"right on {len(data.test)} held-out texts: {scores['accuracy']:.2%}"
        f" (naive Bayes on 1- to 4-grams: {scores['naive_bayes']:.2%},"
        f" always the most common label: {scores['most_common']:.2%})\n"
        f"pictures: {', '.join(drawn)}",
        highlight=False,
        markup=False,
    )


def examples(test: Sequence[Text], seed: int, count: int = 36) -> list[int]:
    """Indices of held-out texts to show: of each label the longest of three random ones.

    At most `count` labels have one.
    """
    draw = random.Random(seed)
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(test):
        if len(text.text) <= class_pictures.LONGEST:
            groups.setdefault(text.label, []).append(index)
    drawn = [
        draw.sample(groups[label], min(3, len(groups[label])))
        for label in sorted(groups, key=_place)[:count]
    ]
    return [max(group, key=lambda index: len(test[index].text)) for group in drawn]


def _verdict(label: str, found: str) -> str:
    return f"{label} ✓" if label == found else f"{label} ✗ {found}"


def _mistakes(test: Sequence[Text], found: Sequence[str]) -> Table:
    table = Table("is", "taken for", "texts", "for example", title="most frequent mistakes")
    wrong = [(text, label) for text, label in zip(test, found, strict=True) if text.label != label]
    counts = Counter((text.label, label) for text, label in wrong)
    for (label, taken), times in counts.most_common(7):
        example = next(text.text for text, given in wrong if (text.label, given) == (label, taken))
        table.add_row(*map(Shown, (label, taken, str(times), example)))
    return table


def classify_text(settings: Settings, checkpoint: Checkpoint) -> list[tuple[str, float]]:
    """The likeliest labels of the text of `--classify`, with their probabilities."""
    known = checkpoint.metadata["known"]
    text = text_command.asked_text(settings, checkpoint, known["characters"])
    reader = Reader.build(settings, known)
    restore(reader.model, checkpoint)
    (probabilities,), _ = reader([text], batch_size=1)
    return [
        (reader.labels.names[i], float(probabilities[i]))
        for i in np.argsort(-probabilities)[:LIKELY]
    ]


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    job = Job.parse(Settings(), arguments)
    if job.checkpoint and job.settings.classify is not None:
        for label, probability in classify_text(job.settings, job.checkpoint):
            print(f"{label}\t{probability:.3f}")
        return
    with job.console.status("reading the data …"):
        data = load(job.settings)
    text_command.check_data(data, job.checkpoint, "texts")
    job.announce(
        f"{len(data.train)} texts to train on, {len(data.test)} held out,"
        f" {data.ambiguous} left out because several labels share them"
    )
    reader = fit(job, data)
    report(reader, data, job.run, job.settings.seed, job.console)
    job.finish()


if __name__ == "__main__":
    main()
