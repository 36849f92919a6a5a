"""Pre-train a small BERT to guess hidden words, and whether two passages follow one another.

Paper: Devlin et al. 2019, https://arxiv.org/abs/1810.04805; positions are relative (Shaw et al.
2018, https://arxiv.org/abs/1803.02155), which few texts suffice to learn.

Claim: in less than ten minutes on two cores it learns from the documentation of Python, 280,000
characters of text, to guess more hidden words of pages that it never saw than counts of the
neighbouring words do, let alone the most frequent word; and to tell what follows far better than
who always gives the same answer, though hardly better than who counts the words in common.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from experiments import BadInput, exits_on_bad_input
from experiments.data import documents, wordpiece
from experiments.data.documents import Document
from experiments.data.ngrams import Neighbours
from experiments.training import command, pictures, text_command, transformer_command
from experiments.training.accumulation import Sum, cross_entropies
from experiments.training.checkpoints import Checkpoint, restore
from experiments.training.command import Job
from experiments.training.loop import Recipe
from experiments.training.transformer_command import Corpus
from jattn import models
from jattn.models import bert, pretraining

SPECIAL = pretraining.Special(pad=0, cls=2, sep=3, mask=4)
MASK = wordpiece.SPECIAL[SPECIAL.mask]
PASSAGE = 16  # tokens, at least
LIKELY = 3  # words that --fill prints
SHOWN = 6  # sentences with a hidden word
RATE = 0.15  # of words that are hidden in evaluation
EVALUATION_BATCH = 32
DRAWS = 3  # pairs of each passage in evaluation
WATCH = 200  # steps between evaluations


@dataclass(frozen=True)
class Settings(transformer_command.TransformerSettings):
    """Pre-train a small BERT on the Python documentation, or on a file."""

    experiment: ClassVar[str] = "pretrain_bert"
    asks: ClassVar[str] = "fill"

    fill: Annotated[
        str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: train)")
    ] = None
    """Guess each [MASK] of this text with the trained checkpoint instead of training."""
    steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 2e-3
    length: int = 64
    vocabulary: int = 1500
    layers: int = 3
    heads: int = 4
    dropout: float = 0.1
    """Fraction dropped in training, of attention weights too."""
    hide: float = 0.3
    """Fraction of the words that are hidden in training; in evaluation it is 0.15."""
    positions: Literal["absolute", "relative_key", "relative_key_query"] = "relative_key_query"
    """How a token knows where it stands."""

    def __post_init__(self) -> None:
        super().__post_init__()
        command.check_fraction(self, "dropout", "hide")
        text_command.check_utf8("fill", self.fill or "")
        if self.fill is not None and MASK not in self.fill:
            raise BadInput(f"expected a text with {MASK} in it, got {self.fill!r}")
        if not self.hide:
            raise BadInput("--hide must be more than 0: hidden words are what BERT learns from")


class Batch(NamedTuple):
    """Pairs of passages with hidden words.

    Shapes: tokens and types [B, T], lengths and follows [B], places and words [B, M].
    """

    tokens: np.ndarray
    types: np.ndarray
    lengths: np.ndarray
    follows: np.ndarray
    places: np.ndarray
    words: np.ndarray


class Batches:
    """Training batches: `batches(step)` yields those of `step`, `step + 1`, …

    Each epoch pairs every passage with the next one or with another, and each step hides words: the
    seed and the number of the step decide.
    """

    def __init__(self, passages: Sequence[Sequence[Sequence[int]]], settings: Settings, C: int):
        self.passages, self.settings, self.vocabulary = passages, settings, C
        self.size = settings.batch_size
        self.per_epoch = max(1, sum(len(each) - 1 for each in passages) // self.size)

    def __call__(self, step: int) -> Iterator[Batch]:
        """Endless batches, starting with the one of `step`, which counts from 0."""
        while True:
            epoch, first = divmod(step, self.per_epoch)
            pairs, follows = self._pairs(epoch)
            for i in range(first, self.per_epoch):
                rows = np.arange(i * self.size, (i + 1) * self.size) % len(pairs)
                key = jax.random.fold_in(jax.random.key(self.settings.seed), step)
                yield self.hidden([pairs[row] for row in rows], follows[rows], key)
                step += 1

    def _pairs(self, epoch: int) -> tuple[list[Any], np.ndarray]:
        random = np.random.default_rng((self.settings.seed, epoch))
        return pretraining.sentence_pairs(self.passages, random)

    def hidden(
        self, pairs: Sequence[Any], follows: np.ndarray, key: jax.Array, rate: float | None = None
    ) -> Batch:
        """A batch of the pairs, in which the key decides which words are hidden."""
        packed = pretraining.pack_pairs(pairs, self.settings.length, SPECIAL)
        rate = rate or self.settings.hide
        hidden = _hide(key, packed.tokens, vocabulary=self.vocabulary, rate=rate)
        tokens, places, words = map(np.asarray, hidden)
        return Batch(tokens, packed.types, packed.lengths, follows, places, words)

    def evaluation(self) -> list[tuple[Batch, int]]:
        """Each passage in several pairs, with the same hidden words in every call.

        Batches have one size, and each comes with the number of its pairs that count.
        """
        drawn = [self._pairs(epoch) for epoch in range(DRAWS)]
        pairs = [pair for each, _ in drawn for pair in each]
        follows = np.concatenate([each for _, each in drawn])
        key, size, found = jax.random.key(self.settings.seed), EVALUATION_BATCH, []
        for start in range(0, len(pairs), size):
            rows = np.arange(start, start + size) % len(pairs)
            key_of = jax.random.fold_in(key, start)
            batch = self.hidden([pairs[row] for row in rows], follows[rows], key_of, RATE)
            found.append((batch, min(size, len(pairs) - start)))
        return found


@functools.partial(jax.jit, static_argnames=("vocabulary", "rate"))
def _hide(key: jax.Array, tokens: Any, *, vocabulary: int, rate: float) -> Any:
    hidden, labels = pretraining.mask_words(key, tokens, SPECIAL, vocabulary=vocabulary, rate=rate)
    most = pretraining.most_places(tokens.shape[-1], rate)
    return hidden, *pretraining.places_of(labels, most)


def passages(tokenizer: Tokenizer, part: Sequence[Document]) -> list[list[list[int]]]:
    """Of each document its sentences as ids, where short ones are joined to what follows.

    Raises:
      BadInput: no document has two of them, or there are only two.
    """
    found = []
    for document in part:
        rows: list[list[int]] = [[]]
        for encoded in tokenizer.encode_batch(
            documents.sentences(document), add_special_tokens=False
        ):
            if len(rows[-1]) >= PASSAGE:
                rows.append([])
            rows[-1] += encoded.ids
        found.append([row for row in rows if row])
    if max(map(len, found)) < 2 or sum(map(len, found)) < 3:
        raise BadInput(
            f"expected sections of several passages of {PASSAGE} tokens, to tell whether one"
            " follows another: sentences end at . ! ? or : before a capital letter"
        )
    return [rows for rows in found if rows]


@dataclass(frozen=True)
class Reader:
    """A model, and its tokenizer."""

    model: models.BertForPreTraining
    tokenizer: Tokenizer

    @classmethod
    def build(cls, settings: Settings, tokenizer: Tokenizer) -> "Reader":
        """An untrained reader."""
        config = bert.Config(
            tokenizer.get_vocab_size(), settings.features, settings.layers, settings.heads,
            4 * settings.features, max_length=settings.length, positions=settings.positions,
            dropout_rate=settings.dropout, attention_dropout_rate=settings.dropout,
        )  # fmt: skip
        rngs = nnx.Rngs(settings.seed)
        return cls(models.BertForPreTraining(config, dtype=settings.dtype, rngs=rngs), tokenizer)

    def fill(self, text: str) -> list[list[tuple[str, float]]]:
        """For each [MASK] of a text the likeliest words and their probabilities.

        Raises:
          BadInput: the text is too long.
        """
        ids = self.tokenizer.encode(text).ids
        longest = self.model.config.max_length
        if len(ids) > longest:
            raise BadInput(f"the text has {len(ids)} tokens, {longest} are the most")
        tokens = np.full((1, longest), SPECIAL.pad, np.int32)
        tokens[0, : len(ids)] = ids
        logits = _words(self.model, tokens, np.array([len(ids)], np.int32))[0]
        places = [i for i, token in enumerate(ids) if token == SPECIAL.mask]
        return [self._likely(logits[place]) for place in places]

    def _likely(self, logits: jax.Array) -> list[tuple[str, float]]:
        probabilities = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))
        best = np.argsort(-probabilities, kind="stable")[:LIKELY]
        return [(str(self.tokenizer.id_to_token(int(i))), float(probabilities[i])) for i in best]


@nnx.jit
def _words(model: models.BertForPreTraining, tokens: Any, lengths: Any) -> jax.Array:
    return model(tokens, lengths=lengths, deterministic=True)[0]


def _outputs(model: Any, batch: Any, **options: Any) -> Any:
    given = {"types": batch.types, "lengths": batch.lengths, "places": batch.places}
    return model(batch.tokens, **given, **options)


def loss(model: models.BertForPreTraining, batch: Any) -> list[Sum]:
    """Negative log-likelihoods of the hidden words, and of what follows; a traced `Batch`."""
    words, follows = _outputs(model, batch)
    return [
        cross_entropies(words, batch.words, ignored=pretraining.IGNORED),
        cross_entropies(follows, batch.follows, ignored=pretraining.IGNORED),
    ]


@nnx.jit
def _right(model: models.BertForPreTraining, batch: Any) -> Any:
    """The losses, the guessed words [B, M], and which passages are said to follow [B]."""
    words, follows = _outputs(model, batch, deterministic=True)
    of_words = cross_entropies(words, batch.words, ignored=pretraining.IGNORED)
    of_next = cross_entropies(follows, batch.follows, ignored=pretraining.IGNORED)
    return (of_words, of_next), jnp.argmax(words, -1), jnp.argmax(follows, -1)


Evaluation = Sequence[tuple[Batch, int]]


def evaluate(model: models.BertForPreTraining, batches: Evaluation) -> dict[str, float]:
    """The loss, and the fractions of hidden words and of pairs that are guessed right.

    A word counts where [MASK] stands, not where it was left or another put in its place.
    """
    found: dict[str, list[np.ndarray]] = {"words": [], "next": []}
    losses = []
    for batch, count in batches:
        sums, words, follows = _right(model, _counted(batch, count))
        losses.append([[float(total), float(number)] for total, number in sums])
        found["words"].append((np.asarray(words) == batch.words)[masked(batch, count)])
        found["next"].append((np.asarray(follows) == batch.follows)[:count])
    (words_loss, words_number), (next_loss, next_number) = np.sum(losses, axis=0)
    fractions = {name: float(np.mean(np.concatenate(each))) for name, each in found.items()}
    return {"loss": words_loss / words_number + next_loss / next_number, **fractions}


def _counted(batch: Batch, count: int) -> Batch:
    """The batch without targets in the rows that fill it up."""
    words, follows = batch.words.copy(), batch.follows.copy()
    words[count:] = follows[count:] = pretraining.IGNORED
    return batch._replace(words=words, follows=follows)


def masked(batch: Batch, count: int) -> np.ndarray:
    """Which places [B, M] of the rows that count hold [MASK]."""
    held = np.take_along_axis(batch.tokens, batch.places, axis=1) == SPECIAL.mask
    real = np.arange(len(held)) < count
    return held & (batch.words != pretraining.IGNORED) & real[:, None]


def baselines(
    train: Sequence[Sequence[Sequence[int]]], batches: Evaluation, of_training: Evaluation
) -> dict[str, float]:
    """The fractions that counting guesses right; it sees the same texts with the same gaps.

    Whether a passage follows it tells by how many different words both have; `of_training` are
    pairs to choose the least number with.
    """
    ends = SPECIAL.cls, SPECIAL.sep  # either may stand before a passage
    rows = [row for document in train for row in document]
    guess = Neighbours(([end, *row, SPECIAL.sep] for row in rows for end in ends), ends)
    right: dict[str, list[bool]] = {"most_frequent": [], "neighbours": []}
    for batch, count in batches:
        for row, column in np.argwhere(masked(batch, count)):
            tokens, place = batch.tokens[row], batch.places[row, column]
            word = batch.words[row, column]
            guessed = guess(int(tokens[place - 1]), int(tokens[place + 1]))
            right["most_frequent"].append(word == guess.most_frequent)
            right["neighbours"].append(word == guessed)
    found = {name: float(np.mean(values)) for name, values in right.items()}
    (common, follows), (of_train, train_follows) = map(in_common, (batches, of_training))
    least = max(range(1, 33), key=lambda n: np.mean((of_train >= n) == (train_follows == 0)))
    share = float(np.mean(follows == 0))
    in_words = float(np.mean((common >= least) == (follows == 0)))
    return {**found, "in_common": in_words, "same_answer": max(share, 1 - share)}


def in_common(batches: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """How many different ids both passages of each pair have, and whether the second follows."""
    common, follows = [], []
    for batch, count in batches:
        for row in range(count):
            tokens, is_second = batch.tokens[row, : batch.lengths[row]], batch.types[row]
            second = is_second[: batch.lengths[row]] == 1
            both = set(tokens[~second].tolist()) & set(tokens[second].tolist())
            common.append(len(both - {*SPECIAL}))
            follows.append(batch.follows[row])
    return np.array(common), np.array(follows)


def read(settings: Settings, checkpoint: Checkpoint | None = None) -> Corpus:
    """The documents as passages of ids, and a tokenizer trained on them, or the checkpoint's."""
    parts = transformer_command.load(settings)

    def train() -> Tokenizer:
        sentences = [each for document in parts.train for each in documents.sentences(document)]
        return wordpiece.train(sentences, settings.vocabulary)

    tokenizer = transformer_command.tokenizer_of(checkpoint, train)
    return Corpus(parts, tokenizer, *(passages(tokenizer, part) for part in parts))


def fit(job: Job[Settings], corpus: Corpus) -> Reader:
    """Train, from the checkpoint on if there is one."""
    settings = job.settings
    with job.console.status("building the model …"):
        reader = Reader.build(settings, corpus.tokenizer)
        reader.model.train()
        C = corpus.tokenizer.get_vocab_size()
        batches = Batches(corpus.train, settings, C)
        validation = Batches(corpus.validation, settings, C).evaluation()
    if settings.remat and jax.default_backend() == "cpu":
        command.warn("--remat: on CPUs XLA needs as much memory for BERT with it as without")
    seen = functools.partial(evaluate, batches=validation)
    watch = transformer_command.validating(WATCH, settings.steps, seen)
    options = settings.recipe(bert.Block)
    recipe = Recipe.adam(job.ends, settings.learning_rate, decay=0.01, **options)
    job.train(reader.model, loss, batches, recipe, watch=watch, **corpus.metadata())
    return reader


def report(reader: Reader, corpus: Corpus, job: Job[Settings]) -> None:
    """Score the part that was not looked at; print and draw the results."""
    run, console, C = job.run, job.console, reader.tokenizer.get_vocab_size()
    with console.status("reading the part that was not looked at …"):
        batches = Batches(corpus.test, job.settings, C).evaluation()
        of_training = Batches(corpus.train, job.settings, C).evaluation()
        counted = baselines(corpus.train, batches, of_training)
        scores = {**evaluate(reader.model, batches), **counted}
    run.write_scores(scores)
    title = f"held out: {scores['words']:.1%} of hidden words right"
    pictures.curve(run.metrics.read(), run.folder / "curve.png", title=title, per="word and pair")
    if hidden := hidden_words(reader, corpus.parts.test, job.settings.seed):
        console.print(_filled(reader, hidden))
    else:
        console.print("no sentence of 8 to 20 words, to show guesses of one of them")
    table = Table("", "hidden words", "what follows", title="right, of what training never saw")
    table.add_row("BERT", f"{scores['words']:.1%}", f"{scores['next']:.1%}")
    table.add_row("counts of neighbouring words", f"{scores['neighbours']:.1%}", "")
    table.add_row("the most frequent word", f"{scores['most_frequent']:.1%}", "")
    table.add_row("the number of words in common", "", f"{scores['in_common']:.1%}")
    table.add_row("always the same answer", "", f"{scores['same_answer']:.1%}")
    console.print(table)
    console.print(f"picture: {run.folder / 'curve.png'}", highlight=False, markup=False)


def _filled(reader: Reader, hidden: Sequence[tuple[str, str]]) -> Table:
    """Sentences in which one word is hidden, that word, and what is guessed."""
    table = Table("sentence", "hidden", "guessed", title="a hidden word")
    for sentence, word in hidden:
        (guesses,) = reader.fill(sentence)
        shown = ", ".join(f"{guess} {probability:.0%}" for guess, probability in guesses)
        colour = "green" if guesses[0][0] == word else "red"
        table.add_row(Text(sentence), word, Text(shown, colour))
    return table


def hidden_words(
    reader: Reader, part: Sequence[Document], seed: int, count: int = SHOWN
) -> list[tuple[str, str]]:
    """Sentences of 8 to 20 words with [MASK] for one of them, which is one token, and that word."""
    random = np.random.default_rng(seed)
    found: list[tuple[str, str]] = []
    texts = [each for document in part for each in documents.sentences(document)]
    for i in random.permutation(len(texts)):
        words = texts[i].split()
        known = [
            j for j, word in enumerate(words)
            if len(word) > 1 and word.isalpha() and word.islower()
            and reader.tokenizer.token_to_id(word) is not None
        ]  # fmt: skip
        if known and 8 <= len(words) <= 20 and len(found) < count:
            j = int(random.choice(known))
            text = " ".join([*words[:j], MASK, *words[j + 1 :]])
            ids = reader.tokenizer.encode(text).ids
            if len(ids) <= reader.model.config.max_length and ids.count(SPECIAL.mask) == 1:
                found.append((text, words[j]))
    return found


def fill_text(settings: Settings, checkpoint: Checkpoint) -> list[list[tuple[str, float]]]:
    """What the checkpoint guesses for each [MASK] of the text of `--fill`."""
    text_command.check_trained(settings, checkpoint)
    reader = Reader.build(settings, Tokenizer.from_str(checkpoint.metadata["tokenizer"]))
    restore(reader.model, checkpoint)
    return reader.fill(settings.fill or "")


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    job = Job.parse(Settings(), arguments)
    transformer_command.before_jax_starts(job.settings)
    if job.checkpoint and job.settings.fill is not None:
        for number, guesses in enumerate(fill_text(job.settings, job.checkpoint), 1):
            for word, probability in guesses:
                print(f"{number}\t{word}\t{probability:.3f}")
        return
    with job.console.status("reading the text, training the tokenizer …"):
        corpus = read(job.settings, job.checkpoint)
    text_command.check_data(corpus.parts, job.checkpoint, "documents")
    job.announce(corpus.describe())
    report(fit(job, corpus), corpus, job)
    job.finish()


if __name__ == "__main__":
    main()
