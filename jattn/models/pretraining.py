"""BERT's pre-training: pairs of texts, words to be predicted, and the loss, over token ids.

Paper: Devlin et al. 2019, https://arxiv.org/abs/1810.04805
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jattn.functional import checks, compat
from jattn.models.tokens import cross_entropy

Array = jax.Array
IGNORED = -100  # the label of what is not to be predicted, as PyTorch and transformers have it
Tokens = Sequence[int]
TextPair = tuple[Tokens, Tokens]


class Special(NamedTuple):
    """The ids of a vocabulary that are no words.

    Attributes:
      pad, cls, sep, mask: of [PAD], [CLS], [SEP] and [MASK].
    """

    pad: int
    cls: int
    sep: int
    mask: int


class Packed(NamedTuple):
    """Pairs of texts as sequences of one length, int32.

    Attributes:
      tokens: `[B, T]`, [CLS] a [SEP] b [SEP], then padding.
      types: `[B, T]`, 0 up to the first [SEP], then 1; 0 for padding.
      lengths: `[B]`, how many tokens of each are no padding.
    """

    tokens: np.ndarray
    types: np.ndarray
    lengths: np.ndarray


def sentence_pairs(
    documents: Sequence[Sequence[Tokens]], random: np.random.Generator
) -> tuple[list[TextPair], np.ndarray]:
    """Every sentence with its successor, or, for about half of them, with one from elsewhere.

    A sentence from elsewhere is of another document, or, where there is only one, any other than
    the two. A generator of another state, such as `np.random.default_rng((seed, epoch))`, draws
    them anew.

    Args:
      documents: each a sequence of sentences, each a sequence of token ids.
      random: decides which pairs are broken, by what, and the order of all.

    Returns:
      The pairs, and for each 0 if the second follows the first, else 1: int32, as `transformers`
      and `pretraining_loss` have it.

    Raises:
      ValueError: there is no document of two sentences, a sentence is empty, or there is no
        sentence from elsewhere.

    Example:
      >>> documents = [[[5, 6], [7], [8]], [[9], [10, 11]]]
      >>> pairs, follows = sentence_pairs(documents, np.random.default_rng(1))
      >>> len(pairs), follows
      (3, array([0, 1, 1], dtype=int32))
    """
    places = [(d, n) for d, document in enumerate(documents) for n in range(len(document))]
    starts = [(d, n) for d, n in places if n + 1 < len(documents[d])]
    if not starts:
        raise ValueError("documents must have one of at least two sentences, got none")
    if not all(len(documents[d][n]) for d, n in places):
        raise ValueError("documents hold an empty sentence")
    if len({d for d, _ in places}) == 1 and len(places) < 3:
        raise ValueError("documents must hold a third sentence, for pairs that do not follow")
    sizes = np.array([len(document) for document in documents])
    before = np.concatenate([[0], np.cumsum(sizes)])  # where each document begins among all places
    follows = random.integers(2, size=len(starts), dtype=np.int32)
    pairs = []
    for i, is_broken in zip(random.permutation(len(starts)), follows, strict=True):
        d, n = other, m = starts[i]
        m += 1
        if is_broken and sizes[d] < len(places):  # any sentence but those of the document
            drawn = random.integers(len(places) - sizes[d])
            other, m = places[drawn + sizes[d] * (drawn >= before[d])]
        elif is_broken:  # any of the only document but the two
            drawn = random.integers(len(places) - 2)
            other, m = places[drawn + 2 * (drawn >= before[d] + n)]
        pairs.append((documents[d][n], documents[other][m]))
    return pairs, follows


def pack_pairs(pairs: Sequence[TextPair], length: int, special: Special) -> Packed:
    """[CLS] a [SEP] b [SEP], shortened or padded to one length.

    Where a pair is too long, the longer text of the two, the second if they are alike, loses its
    last token, again and again. (The code of the paper chooses the same text, and then the first or
    the last token at random; the package `tokenizers` gives an odd last place to the second text.)

    Args:
      pairs: of texts, each a sequence of token ids.
      length: T, at least 5.
      special: ids.

    Raises:
      ValueError: the length is too short, there is no pair, or a text is empty.

    Example:
      >>> packed = pack_pairs([([7, 8, 9], [5])], 8, Special(pad=0, cls=1, sep=2, mask=3))
      >>> packed.tokens, packed.types, packed.lengths
      (array([[1, 7, 8, 9, 2, 5, 2, 0]], dtype=int32), \
array([[0, 0, 0, 0, 0, 1, 1, 0]], dtype=int32), array([7], dtype=int32))
    """
    if length < 5:
        raise ValueError(f"length must be at least 5, for two texts and three marks, got {length}")
    if not pairs:
        raise ValueError("pairs must hold at least one pair, got none")
    tokens = np.full((len(pairs), length), special.pad, np.int32)
    types, lengths = np.zeros_like(tokens), np.zeros(len(pairs), np.int32)
    for row, (first, second) in enumerate(pairs):
        if not len(first) or not len(second):
            raise ValueError(f"pair {row} has an empty text")
        checks.assert_integers(**{f"pair {row}": np.concatenate([first, second])})
        a, b = _shortened(len(first), len(second), length - 3)
        packed = [special.cls, *first[:a], special.sep, *second[:b], special.sep]
        tokens[row, : len(packed)], lengths[row] = packed, len(packed)
        types[row, a + 2 : len(packed)] = 1
    return Packed(tokens, types, lengths)


def _shortened(a: int, b: int, most: int) -> tuple[int, int]:
    """The lengths of two texts after the longer one has lost tokens until both fit."""
    half = most // 2
    if a + b <= most:
        return a, b
    if b <= half:
        return most - b, b
    if a <= most - half:
        return a, most - a
    return most - half, half


def mask_words(
    key: Array,
    tokens: Array | np.ndarray,
    special: Special,
    *,
    vocabulary: int,
    rate: float = 0.15,
) -> tuple[Array, Array]:
    """Choose words to be predicted, and hide most of them.

    Of each sequence a share of the words is chosen, rounded, but at least one. Of the chosen ones
    80 % become [MASK], 10 % any id of the vocabulary, and 10 % stay. It is a pure function of the
    key, made to be compiled within a training step: a new key in each epoch draws them anew.

    Args:
      key: of `jax.random`.
      tokens: ids `[..., T]`.
      special: ids; [PAD], [CLS] and [SEP] are never chosen.
      vocabulary: number of ids.
      rate: the share.

    Returns:
      The tokens with words hidden, and the labels, each `[..., T]`, int32: what stood at the chosen
      places, and `IGNORED` at all others.

    Raises:
      ValueError: an id is not in the vocabulary, or the rate is 0 or lies outside 0 … 1.
      TypeError: tokens are not integers.

    Example:
      >>> special = Special(pad=0, cls=1, sep=2, mask=3)
      >>> tokens = jnp.array([[1, 5, 6, 7, 8, 2, 9, 2, 0, 0]])
      >>> hidden, labels = mask_words(jax.random.key(0), tokens, special, vocabulary=11)
      >>> int((labels != IGNORED).sum())  # 15 % of five words
      1
    """
    checks.assert_in_range("special", special, 0, vocabulary - 1, "the last id of the vocabulary")
    tokens = checks.validated_tokens("tokens", tokens, vocabulary)

    def hide(key: Array, tokens: Array) -> tuple[Array, Array]:
        of_order, of_fate, of_word = jax.random.split(key, 3)
        order, fate = (
            jax.random.uniform(each, tokens.shape, jnp.float32) for each in (of_order, of_fate)
        )
        words = jax.random.randint(of_word, tokens.shape, 0, vocabulary, jnp.int32)
        return hide_words(tokens, special, order, fate, words, rate=rate)

    spec = jax.typeof(tokens).sharding.spec
    return compat.automatically(hide, (spec, spec))(key, tokens)


def hide_words(
    tokens: Array, special: Special, order: Array, fate: Array, words: Array, *, rate: float = 0.15
) -> tuple[Array, Array]:
    """`mask_words` with the numbers that it draws.

    Args:
      tokens, special, rate: as `mask_words` takes them.
      order: `[..., T]`, no two of a sequence alike: the words of the greatest are chosen.
      fate: `[..., T]`, from 0 to 1: below 0.8 a chosen word becomes [MASK], and below 0.9 another.
      words: ids `[..., T]`, the others.

    Returns:
      As `mask_words`.

    Example:
      >>> special, tokens = Special(pad=0, cls=1, sep=2, mask=3), jnp.array([[1, 5, 6, 2]])
      >>> order = fate = jnp.array([[0.9, 0.2, 0.7, 0.8]])
      >>> hide_words(tokens, special, order, fate, tokens + 1)
      (Array([[1, 5, 3, 2]], dtype=int32), Array([[-100, -100,    6, -100]], dtype=int32))
    """
    checks.assert_shapes(
        tokens=(tokens, "... T"), order=(order, "... T"), fate=(fate, "... T"),
        words=(words, "... T"),
    )  # fmt: skip
    checks.assert_integers(tokens=tokens, words=words)
    tokens, words = jnp.asarray(tokens, jnp.int32), jnp.asarray(words, jnp.int32)
    is_word = (tokens != special.pad) & (tokens != special.cls) & (tokens != special.sep)
    number = _share(jnp, is_word.sum(axis=-1, keepdims=True).astype(jnp.float32), rate)
    place = jnp.argsort(jnp.argsort(jnp.where(is_word, -order, jnp.inf), axis=-1), axis=-1)
    chosen = is_word & (place.astype(jnp.int32) < number)
    changed = jnp.where(fate < 0.8, special.mask, jnp.where(fate < 0.9, words, tokens))
    return jnp.where(chosen, changed, tokens), jnp.where(chosen, tokens, IGNORED)


def places_of(labels: Array, most: int) -> tuple[Array, Array]:
    """Where words are to be predicted, so that a model predicts no others.

    Args:
      labels: from `mask_words`, `[..., T]`.
      most: M, how many places there are in each sequence; `most_places` tells how many may be
        needed. Under jit, where labels cannot be counted, those beyond it are lost.

    Returns:
      The places `[..., M]`, in order, and the labels there `[..., M]`, both int32. Where there are
      fewer the rest are places of no label, `IGNORED`.

    Raises:
      ValueError: M is not in 1 … T, or known labels have more places.

    Example:
      >>> places_of(jnp.array([[IGNORED, 7, IGNORED, 5]]), 3)
      (Array([[1, 3, 0]], dtype=int32), Array([[   7,    5, -100]], dtype=int32))
    """
    T = checks.assert_shapes(labels=(labels, "... T"))["T"]
    checks.assert_integers(labels=labels)
    checks.assert_in_range("most", most, 1, T, "T, the number of labels")
    known = checks.concrete(labels)
    if known is not None and (found := (known != IGNORED).sum(axis=-1).max(initial=0)) > most:
        raise ValueError(f"labels have up to {found} places, got most = {most}")
    labels = jnp.asarray(labels, jnp.int32)
    places = jnp.argsort(labels == IGNORED, axis=-1, stable=True)[..., :most].astype(jnp.int32)
    return places, jnp.take_along_axis(labels, places, axis=-1)


def most_places(length: int, rate: float = 0.15) -> int:
    """How many words `mask_words` chooses at most of a sequence of T tokens.

    Example:
      >>> most_places(128)
      19
    """
    checks.assert_positive(length=length)
    return int(_share(np, np.float32(length), rate))


def _share(numpy: Any, number: Any, rate: float) -> Any:
    """How many of a number of words are chosen; in float32, so that NumPy and JAX round alike."""
    checks.assert_probability(rate=rate)
    if rate == 0:
        raise ValueError("rate must be more than 0, for at least one word is chosen")
    return numpy.maximum(numpy.round(number * np.float32(rate)), np.float32(1)).astype(np.int32)


def pretraining_loss(word_logits: Array, next_logits: Array, words: Array, follows: Array) -> Array:
    """The mean negative log-likelihood of the hidden words, plus that of the order of the texts.

    Args:
      word_logits, next_logits: from `BertForPreTraining`.
      words: ids `[..., T]`, or `[..., M]` at places: what stood there; `IGNORED` where nothing is
        to be predicted.
      follows: integers `[...]`: 0 where the second text follows the first, else 1.

    Returns:
      A scalar in nats; NaN if no word is to be predicted.

    Example:
      >>> words, follows = jnp.array([[IGNORED, 2, IGNORED]]), jnp.array([0])
      >>> loss = pretraining_loss(jnp.zeros((1, 3, 4)), jnp.zeros((1, 2)), words, follows)
      >>> loss.round(3)  # log 4 + log 2
      Array(2.079, dtype=float32)
    """
    checks.assert_shapes(word_logits=(word_logits, "... T C"), words=(words, "... T"))
    checks.assert_shapes(next_logits=(next_logits, "... 2"), follows=(follows, "..."))
    checks.assert_integers(words=words, follows=follows)
    checks.assert_in_range("follows", follows, 0, 1, "1: it does not follow")
    of_words = cross_entropy(word_logits, words, ignored=IGNORED)
    return of_words + cross_entropy(next_logits[..., None, :], jnp.asarray(follows)[..., None])
