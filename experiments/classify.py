"""Tell the language of a name by attention to its characters, and show which of them told.

The model is a BiLSTM whose steps a learned query pools (Zhou et al. 2016,
https://aclanthology.org/P16-2034).

Claim: in a few minutes on a laptop, the model learns to tell 34 languages apart, many of them
close, by the names of territories, languages and currencies: it is right for 86 % of the names of
things that it has never seen named. That is one point less than naive Bayes on counts of 1- to
4-grams, which take seconds: so few short texts need no network. What no short run of characters
tells it learns too, and naive Bayes does not, as the tests show.

Names are held out by what they name, so that no translation of a held-out name is trained on. A
name that is written alike in several languages is left out on both sides: no one answer to it is
right.
"""

import hashlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text as Shown

from experiments import BadInput
from experiments.data import labelled, names
from experiments.data.batches import Batches, Vocabulary, fixed_batches
from experiments.data.labelled import Labels, Split, Text
from experiments.data.ngrams import NaiveBayes
from experiments.data.pairs import MAX_CHARACTERS, Pair, normalise
from experiments.training import class_pictures, command, pictures
from experiments.training.checkpoints import Checkpoint, restore
from experiments.training.loop import Recipe, train
from experiments.training.runs import Run
from jattn import nn
from jattn.models import classifier

NAME = "classify"
EVALUATION_BATCH = 256
LIKELY = 3  # labels that --classify prints

NEWEST = "(default: a new one in runs/classify; with --resume and --classify, the newest there)"


@dataclass(frozen=True)
class Settings:
    """Train a classifier of texts by attention; without options: names in 34 languages."""

    data: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: names)")
    ] = None
    """Train on your own texts: a CSV or TSV file in UTF-8 with a header; a tenth is held out."""
    text_column: str = "text"
    """Column of the file that holds the texts."""
    label_column: str = "label"
    """Column of the file that holds their labels."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint=NEWEST)] = (
        None
    )
    """Folder of the run."""
    classify: Annotated[
        str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: train)")
    ] = None
    """Classify this text with the trained checkpoint instead of training."""
    resume: bool = False
    """Continue the run after a kill or Ctrl-C; its settings are taken over."""
    steps: int = 1800
    """Optimization steps."""
    batch_size: int = 256
    """Texts in a step."""
    learning_rate: float = 6e-3
    """Peak of Adam's rate, after a warm-up and before a cosine descent."""
    features: int = 128
    """Width of each direction of the recurrent layer; the embeddings have half of it."""
    layers: int = 1
    """Recurrent layers in each direction."""
    dropout: float = 0.3
    """Fraction of what each layer reads that is dropped in training."""
    seed: int = 0
    """Decides the weights, the split and the order of the data."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "features", "layers"):
            if getattr(self, name) < 1:
                raise BadInput(
                    f"{command.option(name)} must be at least 1, got {getattr(self, name)}"
                )
        if not 0 < self.learning_rate < math.inf:
            raise BadInput(f"--learning-rate must be finite and positive, got {self.learning_rate}")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"--dropout must lie in [0, 1), got {self.dropout}")
        if self.seed < 0:
            raise BadInput(f"--seed must not be negative, got {self.seed}")
        if self.resume and self.classify is not None:
            raise BadInput("give --resume or --classify, not both")


SIZES = ("features", "layers", "dropout")
TRAINING = ("steps", "batch_size", "learning_rate", *SIZES, "seed")  # what the weights depend on
TABLE = ("text_column", "label_column")


@dataclass(frozen=True)
class Reader:
    """A model, the characters that it reads and the labels that it gives."""

    model: classifier.Classifier
    characters: Vocabulary
    labels: Labels

    @classmethod
    def build(cls, settings: Settings, known: dict[str, Any]) -> "Reader":
        """An untrained one; `known` is what `describe` gives."""
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
        """The probability of every label [C] for each text, and the weights of its characters."""
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
    """The characters and labels of the training texts: all that the model needs of the data."""
    return {
        "characters": Vocabulary.of(text.text for text in data.train).characters,
        "labels": sorted({text.label for text in data.train}, key=_place),
    }


def _place(label: str) -> tuple[int, str]:
    """Of languages close ones side by side; else the order of the alphabet."""
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
    """Mean negative log-likelihood of the label; the batch is a traced `Batch`.

    The label is the one target of a text.
    """
    logits = model(batch.source, lengths=batch.source_lengths)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.target_out[:, 0]).mean()


def fit(
    settings: Settings, data: Split, run: Run, checkpoint: Checkpoint | None, console: Console
) -> Reader | None:
    """Train, from the checkpoint on if there is one; None if Ctrl-C stopped it."""
    known = describe(data)
    reader = Reader.build(settings, known)
    reader.model.train()
    batches = Batches(
        [Pair(text.text, text.label) for text in data.train], reader.characters, reader.labels,
        batch_size=settings.batch_size, seed=settings.seed, num_buckets=6,
    )  # fmt: skip
    metadata = {
        "experiment": NAME,
        "settings": {name: getattr(settings, name) for name in (*TRAINING, *TABLE)},
        "data": str(settings.data.absolute()) if settings.data else None,
        "digest": _digest(data),
        "known": known,
    }
    recipe = Recipe.adam(settings.steps, settings.learning_rate)
    finished = train(
        reader.model,
        loss,
        batches,
        recipe,
        run,
        checkpoint=checkpoint,
        metadata=metadata,
        console=console,
    )
    return reader if finished else None


def evaluate(found: Sequence[str], data: Split) -> dict[str, float]:
    """The fraction of held-out texts that are labelled right, and that of two baselines."""
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
    """Score the held-out texts; print and draw what came out."""
    with console.status("classifying the held-out texts …"):
        probabilities, weights = reader([text.text for text in data.test])
        found = [reader.labels.names[index] for index in probabilities.argmax(axis=1)]
        scores = evaluate(found, data)
    (run.folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
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
    """Indices of held-out texts to look at: the longest of any three of each label.

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


def settings_of(metadata: Mapping[str, Any]) -> Settings:
    """The settings that a checkpoint was made with."""
    return Settings(
        data=Path(metadata["data"]) if metadata["data"] else None, **metadata["settings"]
    )


def classify_text(settings: Settings, checkpoint: Checkpoint) -> list[tuple[str, float]]:
    """The likeliest labels of `--classify` by the checkpoint's weights, and their probabilities."""
    text = normalise(settings.classify or "")
    if not 1 <= len(text) <= MAX_CHARACTERS:
        raise BadInput(
            f"--classify must be a text of 1 to {MAX_CHARACTERS} characters, got {len(text)}"
        )
    if checkpoint.step == 0:
        raise BadInput(
            "only the untrained weights of step 0 are there: train first, or continue with --resume"
        )
    if checkpoint.step < settings.steps:
        command.warn(
            f"half trained: this is the checkpoint of step {checkpoint.step} of {settings.steps}"
        )
    reader = Reader.build(settings, checkpoint.metadata["known"])
    restore(reader.model, checkpoint)
    unknown = sorted(set(text) - set(reader.characters.characters))
    if unknown:
        command.warn(f"never seen in training: {' '.join(unknown)}")
    (probabilities,), _ = reader([text], batch_size=1)
    return [
        (reader.labels.names[i], float(probabilities[i]))
        for i in np.argsort(-probabilities)[:LIKELY]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    start = time.perf_counter()
    try:
        settings = command.parse(Settings(), NAME, arguments)
        run, checkpoint = None, None
        if settings.resume or settings.classify is not None:
            compared = (*TRAINING, *TABLE) if settings.resume else (*TRAINING, *TABLE, "data")
            settings, run, checkpoint = command.continue_from(
                settings.run_dir, NAME, arguments, settings_of, compared
            )
        if settings.classify is not None and checkpoint:
            for label, probability in classify_text(settings, checkpoint):
                print(f"{label}\t{probability:.3f}")
            return
        data = load(settings)
        if checkpoint and checkpoint.metadata["digest"] != _digest(data):
            raise BadInput("--data gives other texts than those that the checkpoint was trained on")
        run = run or Run.create(settings.run_dir, NAME)
        console = Console()
        console.print(
            f"{len(data.train)} texts to train on, {len(data.test)} held out;"
            f" {data.ambiguous} left out, which several labels have; run folder {run.folder}",
            markup=False,
        )
        reader = fit(settings, data, run, checkpoint, console)
        if reader is None:
            console.print(f"stopped; continue with --resume --run-dir {run.folder}", markup=False)
            raise SystemExit(130)
        report(reader, data, run, settings.seed, console)
        console.print(f"took {(time.perf_counter() - start) / 60:.1f} minutes", highlight=False)
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None


def _digest(data: Split) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


if __name__ == "__main__":
    main()
