"""BERT's pre-training: which texts make a pair, which words are hidden, and the loss."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jattn.models.pretraining import (
    IGNORED,
    Special,
    hide_words,
    mask_words,
    most_places,
    pack_pairs,
    places_of,
    pretraining_loss,
    sentence_pairs,
)

PAD, CLS, SEP, MASK = 0, 1, 2, 3
SPECIAL = Special(PAD, CLS, SEP, MASK)
C = 50


def generator(*seed):
    return np.random.default_rng(seed)


def books(*sizes):
    """Documents of so many sentences; a sentence is [document, its number]."""
    return [[[d + 1, n + 1] for n in range(size)] for d, size in enumerate(sizes)]


def rows(*lengths, T):
    """[CLS] words [SEP] words [SEP] and padding, of so many words."""
    tokens = np.full((len(lengths), T), PAD)
    for row, words in enumerate(lengths):
        first = words // 2
        ids = 4 + np.arange(words) % (C - 4)
        packed = [CLS, *ids[:first], SEP, *ids[first:], SEP]
        tokens[row, : len(packed)] = packed
    return tokens


def test_every_sentence_with_a_successor_begins_one_pair():
    documents = books(4, 1, 3)
    pairs, follows = sentence_pairs(documents, generator(0))
    firsts = sorted(first for first, _ in pairs)
    assert firsts == [[1, 1], [1, 2], [1, 3], [3, 1], [3, 2]]
    assert follows.dtype == np.int32 and set(follows) <= {0, 1}


def test_a_state_of_the_generator_is_one_choice_and_an_epoch_has_its_own():
    documents = books(9, 7, 8)
    first, again, other = (
        sentence_pairs(documents, np.random.default_rng((5, epoch))) for epoch in (0, 0, 1)
    )
    assert first[0] == again[0] and first[1].tolist() == again[1].tolist()
    assert first[0] != other[0] and first[1].tolist() != other[1].tolist()
    seconds = [{tuple(a): tuple(b) for a, b in pairs} for pairs, _ in (first, other)]
    assert seconds[0] != seconds[1]


def test_half_of_the_pairs_follow_and_the_others_are_of_another_document():
    documents = books(2001, 1, 1000, 1001)
    pairs, follows = sentence_pairs(documents, generator(1))
    n = len(pairs)
    assert n == 3999
    assert abs(int(follows.sum()) - n / 2) < 5 * np.sqrt(n) / 2
    for (first, second), broken in zip(pairs, follows, strict=True):
        follow = second == [first[0], first[1] + 1]
        assert follow if not broken else second[0] != first[0]
    sources = {second[0] for (_, second), broken in zip(pairs, follows, strict=True) if broken}
    assert {1, 3, 4} <= sources
    order = [first for first, _ in pairs]
    assert order != sorted(order)


def test_sentences_from_elsewhere_are_alike_to_be_drawn():
    """The first document has one pair; its broken second is one of 6 sentences in 3 documents."""
    documents, counts = books(2, 1, 2, 3), collections.Counter()
    for seed in range(3000):
        pairs, follows = sentence_pairs(documents, generator(seed))
        for (first, second), broken in zip(pairs, follows, strict=True):
            if broken and first == [1, 1]:
                counts[tuple(second)] += 1
    n = sum(counts.values())
    assert len(counts) == 6 and abs(n - 1500) < 5 * np.sqrt(750)
    assert all(abs(count - n / 6) < 5 * np.sqrt(n * 5 / 36) for count in counts.values())


def test_in_the_only_document_a_broken_second_is_neither_sentence():
    for documents in (books(5), [*books(5), []]):
        seen = collections.defaultdict(set)
        for seed in range(200):
            pairs, follows = sentence_pairs(documents, generator(seed))
            for (first, second), broken in zip(pairs, follows, strict=True):
                if broken:
                    seen[first[1]].add(second[1])
        assert seen == {n: set(range(1, 6)) - {n, n + 1} for n in range(1, 5)}


@pytest.mark.parametrize(
    ("match", "documents"),
    [
        ("one of at least two sentences", []),
        ("one of at least two sentences", books(1, 1)),
        ("an empty sentence", [[[1], []]]),
        ("an empty sentence", [[[1], [2]], [[]]]),
        ("a third sentence", [[[1], [2]]]),
    ],
)
def test_documents_that_make_no_pairs(match, documents):
    for seed in range(8):
        with pytest.raises(ValueError, match=match):
            sentence_pairs(documents, generator(seed))


def test_a_pair_that_is_packed():
    pairs = [([7, 8], [9]), ([5], [6, 7, 8]), ([5, 6, 7], [8, 9])]
    packed = pack_pairs(pairs, 8, SPECIAL)
    assert packed.tokens.tolist() == [
        [CLS, 7, 8, SEP, 9, SEP, PAD, PAD],
        [CLS, 5, SEP, 6, 7, 8, SEP, PAD],
        [CLS, 5, 6, 7, SEP, 8, 9, SEP],
    ]
    # [SEP] after the first text is of type 0, after the second of type 1, padding of type 0
    assert packed.types.tolist() == [
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]
    assert packed.lengths.tolist() == [6, 7, 8]
    assert {array.dtype for array in packed} == {np.dtype(np.int32)}


def test_padding_has_the_id_that_is_said():
    packed = pack_pairs([([7], [8])], 7, Special(pad=40, cls=41, sep=42, mask=43))
    assert packed.tokens.tolist() == [[41, 7, 42, 8, 42, 40, 40]]


@pytest.mark.parametrize(
    ("texts", "length", "kept"),
    [
        ((6, 2), 9, (4, 2)),  # the longer one loses
        ((2, 6), 9, (2, 4)),
        ((6, 5), 9, (3, 3)),
        ((6, 6), 8, (3, 2)),  # alike: the second loses
        ((4, 3), 8, (3, 2)),
        ((3, 9), 8, (3, 2)),
        ((9, 1), 5, (1, 1)),
        ((1, 1), 5, (1, 1)),
    ],
)
def test_a_pair_that_is_too_long_loses_its_last_tokens(texts, length, kept):
    first, second = np.arange(10, 10 + texts[0]), np.arange(30, 30 + texts[1])
    packed = pack_pairs([(first, second)], length, SPECIAL)
    expected = [CLS, *first[: kept[0]], SEP, *second[: kept[1]], SEP]
    assert packed.tokens[0, : len(expected)].tolist() == expected
    assert packed.lengths.tolist() == [len(expected)]


def losing_one_by_one(a, b, most):
    while a + b > most:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    return a, b


def test_tokens_are_lost_one_by_one():
    for a, b, length in itertools.product(range(1, 9), range(1, 9), range(5, 15)):
        packed = pack_pairs([([7] * a, [8] * b)], length, SPECIAL)
        kept = [(packed.tokens == word).sum() for word in (7, 8)]
        assert tuple(kept) == losing_one_by_one(a, b, length - 3)


@pytest.mark.parametrize(
    ("match", "pairs", "length"),
    [
        ("length must be at least 5, for two texts and three marks, got 4", [([5], [6])], 4),
        ("at least one pair", [], 8),
        ("pair 1 has an empty text", [([5], [6]), ([5], [])], 8),
        ("pair 0 has an empty text", [([], [6])], 8),
    ],
)
def test_pairs_that_cannot_be_packed(match, pairs, length):
    with pytest.raises(ValueError, match=match):
        pack_pairs(pairs, length, SPECIAL)


@pytest.mark.torch
def test_pairs_are_packed_as_by_the_tokenizer_of_transformers(tmp_path):
    """Where one token must go of texts that are alike, versions differ: the last one is left out.

    Version 4 in Python, as Google's code, takes it from the second text; the fast tokenizer, which
    is the only one of version 5, takes an odd one from the first.
    """
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    for a, b, length in itertools.product(range(1, 8), range(1, 8), range(5, 13)):
        first, second = list(range(5, 5 + a)), list(range(15, 15 + b))
        theirs = tokenizer(
            *(" ".join(words[n] for n in text) for text in (first, second)),
            truncation="longest_first", padding="max_length", max_length=length,
        )  # fmt: skip
        ours = pack_pairs([(first, second)], length, SPECIAL)
        most = length - 3
        if a + b > most and most % 2 and most // 2 < a <= b:
            continue
        assert theirs["input_ids"] == ours.tokens[0].tolist(), (a, b, length)
        assert theirs["token_type_ids"] == ours.types[0].tolist()
        assert sum(theirs["attention_mask"]) == ours.lengths[0]


def numbers_of(labels):
    return np.sum(np.asarray(labels) != IGNORED, axis=-1)


def test_only_words_are_chosen_and_15_percent_of_them_but_at_least_one():
    lengths = [1, 2, 3, 9, 10, 13, 14, 17, 20, 37, 57]
    tokens = rows(*lengths, T=60)
    expected = [max(1, round(0.15 * n)) for n in lengths]
    assert expected == [1, 1, 1, 1, 2, 2, 2, 3, 3, 6, 9]
    for seed in range(5):
        hidden, labels = mask_words(jax.random.key(seed), tokens, SPECIAL, vocabulary=C)
        assert hidden.dtype == labels.dtype == jnp.int32
        assert numbers_of(labels).tolist() == expected
        chosen = np.asarray(labels) != IGNORED
        assert not (chosen & np.isin(tokens, [PAD, CLS, SEP])).any()
        np.testing.assert_array_equal(labels, np.where(chosen, tokens, IGNORED))
        np.testing.assert_array_equal(np.asarray(hidden)[~chosen], tokens[~chosen])


def test_rows_without_words_choose_nothing():
    tokens = np.array([[CLS, SEP, SEP, PAD], [PAD] * 4, [CLS, 9, SEP, SEP]])
    hidden, labels = mask_words(jax.random.key(0), tokens, SPECIAL, vocabulary=C, rate=0.9)
    np.testing.assert_array_equal(hidden[:2], tokens[:2])
    assert numbers_of(labels).tolist() == [0, 0, 1]
    empty = mask_words(jax.random.key(0), tokens[:, :0], SPECIAL, vocabulary=C)
    assert empty[0].shape == empty[1].shape == (3, 0)


@pytest.mark.parametrize(("rate", "number"), [(0.01, 1), (0.5, 10), (1.0, 20)])
def test_the_rate_is_the_share(rate, number):
    _, labels = mask_words(jax.random.key(0), rows(20, T=30), SPECIAL, vocabulary=C, rate=rate)
    assert numbers_of(labels).tolist() == [number]


def test_a_word_that_is_mask_already_may_be_chosen():
    """As in the paper's code, where [MASK] is a word like another."""
    _, labels = mask_words(jax.random.key(0), np.array([[MASK]]), SPECIAL, vocabulary=C)
    assert labels.tolist() == [[MASK]]


def test_places_are_uniform_and_fates_80_10_10():
    """Within five standard deviations; a random word is of the whole vocabulary, specials too."""
    keys, tokens = 400, rows(20, 20, 20, 20, T=25)
    of_all = jax.jit(jax.vmap(lambda key: mask_words(key, tokens, SPECIAL, vocabulary=C, rate=0.5)))
    hidden, labels = map(np.asarray, of_all(jax.random.split(jax.random.key(2), keys)))
    chosen = labels != IGNORED
    n = int(chosen.sum())
    assert n == keys * 4 * 10

    def is_share(count, of, share):
        assert abs(count - of * share) < 5 * np.sqrt(of * share * (1 - share))

    is_words = tokens >= 4
    for place in np.argwhere(is_words):
        is_share(chosen[:, *place].sum(), keys, 0.5)
    whole = np.broadcast_to(tokens, hidden.shape)[chosen]
    found = hidden[chosen]
    is_share((found == MASK).sum(), n, 0.8 + 0.1 / C)
    is_share((found == whole).sum(), n, 0.1 + 0.1 / C)
    others = found[(found != MASK) & (found != whole)]
    is_share(len(others), n, 0.1 * (C - 2) / C)
    counts = np.bincount(others, minlength=C)
    assert (counts[[PAD, CLS, SEP]] > 0).all() and counts[MASK] == 0
    expected = np.where(np.arange(C) == MASK, 0, 0.1 * n / C)
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 1e-9).all()


def test_fates_do_not_depend_on_the_place():
    """Of two chosen words of one row each has its own: both masked in 64 % of all rows."""
    tokens = rows(2, T=5)
    of_all = jax.vmap(lambda key: mask_words(key, tokens[0], SPECIAL, vocabulary=C, rate=1.0)[0])
    hidden = np.asarray(of_all(jax.random.split(jax.random.key(1), 2000)))
    both = int(((hidden == MASK).sum(-1) == 2).sum())
    assert abs(both - 2000 * 0.802**2) < 5 * np.sqrt(2000 * 0.64 * 0.36)


def test_one_key_is_one_choice():
    tokens = rows(20, 9, 30, T=40)
    first, again, other = (
        mask_words(jax.random.key(seed), tokens, SPECIAL, vocabulary=C) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first[1] != other[1]).any()


def test_jit_and_vmap_choose_by_the_same_rules():
    tokens, key = rows(20, 9, 30, T=40), jax.random.key(0)
    expected = mask_words(key, tokens, SPECIAL, vocabulary=C)
    compiled = jax.jit(lambda key, tokens: mask_words(key, tokens, SPECIAL, vocabulary=C))
    np.testing.assert_array_equal(compiled(key, tokens), expected)
    keys = jax.random.split(key, 3)
    found = jax.vmap(compiled)(keys, tokens)
    alone = [mask_words(*each, SPECIAL, vocabulary=C) for each in zip(keys, tokens, strict=True)]
    np.testing.assert_array_equal(found, np.stack(alone, axis=1))
    assert numbers_of(found[1]).tolist() == numbers_of(expected[1]).tolist() == [3, 1, 4]


def test_narrow_ids_become_int32():
    tokens = rows(20, T=25)
    expected = mask_words(jax.random.key(0), tokens, SPECIAL, vocabulary=C)
    for dtype in (np.uint8, np.int16):
        found = mask_words(jax.random.key(0), tokens.astype(dtype), SPECIAL, vocabulary=C)
        np.testing.assert_array_equal(found, expected)
        assert found[0].dtype == found[1].dtype == jnp.int32


def test_narrow_ids_are_hidden_as_wide_ones():
    tokens = rows(20, T=25)
    draws = np.random.default_rng(0).random((2, *tokens.shape))
    expected = hide_words(tokens, SPECIAL, *draws, tokens)
    narrow = hide_words(tokens.astype(np.uint8), SPECIAL, *draws, tokens.astype(np.uint8))
    np.testing.assert_array_equal(narrow, expected)


def test_no_rows_have_no_places():
    places, labels = places_of(np.zeros((0, 7), np.int32), 3)
    assert places.shape == labels.shape == (0, 3)


def test_hiding_by_known_numbers():
    """Of 7 words at rate 0.5 four are chosen: 3.5 rounds to the even number."""
    tokens = np.array([[CLS, 10, 11, 12, SEP, 13, 14, 15, 16, SEP, PAD]])
    order = np.array([[9, 0.7, 0.1, 0.6, 9, 0.5, 0.2, 0.3, 0.8, 9, 9]])
    fate = np.array([[0, 0.79, 0, 0.8, 0, 0.9, 0, 0, 0.89, 0, 0]])
    hidden, labels = hide_words(tokens, SPECIAL, order, fate, tokens + 20, rate=0.5)
    assert hidden.tolist() == [[CLS, MASK, 11, 32, SEP, 13, 14, 15, 36, SEP, PAD]]
    assert labels.tolist() == [
        [IGNORED, 10, IGNORED, 12, IGNORED, 13, IGNORED, IGNORED, 16, IGNORED, IGNORED]
    ]


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, "rate must lie in 0 … 1, got 1.5", {"rate": 1.5}),
        (TypeError, "rate must be a Python number", {"rate": "15 %"}),
        (ValueError, "tokens must lie in 0 … 4 .*got 23", {"vocabulary": 5}),
        (TypeError, "tokens must be integers", {"tokens": np.ones((2, 5))}),
    ],
)
def test_what_cannot_be_hidden(error, match, changes):
    given = {"tokens": rows(20, T=25), "vocabulary": C, "rate": 0.15} | changes
    with pytest.raises(error, match=match):
        mask_words(jax.random.key(0), given.pop("tokens"), SPECIAL, **given)


@pytest.mark.parametrize("name", ["order", "fate", "words"])
def test_numbers_of_another_shape_are_refused(name):
    tokens = rows(20, T=25)
    given = {"order": np.ones((1, 25)), "fate": np.ones((1, 25)), "words": tokens}
    given[name] = given[name][:, :3]
    with pytest.raises(ValueError, match=rf"{name} must be .*got shape \(1, 3\)"):
        hide_words(tokens, SPECIAL, **given)


def test_places_and_back():
    tokens = rows(20, 9, 1, 30, T=40)
    _, labels = mask_words(jax.random.key(0), tokens, SPECIAL, vocabulary=C)
    for M in (most_places(40), 40):
        places, words = places_of(labels, M)
        assert places.shape == words.shape == (4, M)
        assert places.dtype == words.dtype == jnp.int32
        back = np.full(labels.shape, IGNORED)
        np.put_along_axis(back, np.asarray(places), np.asarray(words), axis=-1)
        np.testing.assert_array_equal(back, labels)
        real = np.asarray(words) != IGNORED
        for row in range(4):
            known = np.asarray(places)[row, real[row]]
            assert known.tolist() == np.flatnonzero(np.asarray(labels)[row] != IGNORED).tolist()
        assert all(len(set(row)) == M for row in places.tolist())
    compiled = jax.jit(lambda labels: places_of(labels, 6))(labels)
    np.testing.assert_array_equal(compiled, places_of(labels, 6))
    np.testing.assert_array_equal(jax.vmap(lambda x: places_of(x, 6))(labels), compiled)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.15, 0.5, 1.0])
def test_most_places_never_lose_a_word(rate):
    """Words are at most T; of all counts the share is rounded in float32, as most_places is."""
    lengths = np.arange(1, 601)
    tokens = np.where(np.arange(600) < lengths[:, None], 5, PAD)
    order = np.broadcast_to(np.linspace(0, 1, 600, dtype=np.float32), tokens.shape)
    hide = jax.jit(lambda tokens: hide_words(tokens, SPECIAL, order, order, tokens, rate=rate))
    found = numbers_of(hide(tokens)[1])
    assert found.tolist() == [most_places(int(T), rate) for T in lengths]
    assert (np.diff(found) >= 0).all() and (found <= lengths).all() and found.min() == 1


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "labels have up to 2 places, got most = 1", lambda x: places_of(x, 1)),
        (ValueError, "most must lie in 1 … 4", lambda x: places_of(x, 0)),
        (ValueError, "most must lie in 1 … 4", lambda x: places_of(x, 5)),
        (TypeError, "labels must be integers", lambda x: places_of(x * 1.0, 2)),
        (ValueError, r"labels must be \[..., T\]", lambda x: places_of(x[0, 0], 2)),
        (ValueError, "length must be", lambda x: most_places(0)),
        (ValueError, "rate must lie in 0 … 1", lambda x: most_places(8, 1.5)),
    ],
)
def test_bad_places_are_named(error, match, call):
    with pytest.raises(error, match=match):
        call(np.array([[IGNORED, 5, 6, IGNORED]]))


def losses(rng, B=3, T=6, dtype=np.float64):
    word_logits, next_logits = (rng.normal(size=(B, *s)).astype(dtype) for s in ((T, C), (2,)))
    words = np.where(rng.random((B, T)) < 0.4, rng.integers(0, C, (B, T)), IGNORED)
    return word_logits, next_logits, words, rng.integers(0, 2, B)


def test_the_loss_is_the_mean_over_words_plus_the_mean_over_pairs(rng, x64):
    word_logits, next_logits, words, follows = losses(rng)

    def surprise(logits, target):
        return np.log(np.exp(logits).sum()) - logits[target]

    real = np.argwhere(words != IGNORED)
    assert 3 < len(real) < words.size
    of_words = np.mean([surprise(word_logits[b, t], words[b, t]) for b, t in real])
    of_pairs = np.mean([surprise(*each) for each in zip(next_logits, follows, strict=True)])
    found = pretraining_loss(word_logits, next_logits, words, follows)
    np.testing.assert_allclose(found, of_words + of_pairs, rtol=1e-14)
    compiled = jax.jit(pretraining_loss)(word_logits, next_logits, words, follows)
    np.testing.assert_allclose(compiled, found, rtol=1e-14)
    assert (
        pretraining_loss(
            *(jnp.asarray(each, jnp.bfloat16) for each in (word_logits, next_logits)),
            words,
            follows,
        ).dtype
        == jnp.float32
    )


def test_a_loss_at_places_is_that_of_all(rng, x64):
    word_logits, next_logits, words, follows = losses(rng)
    places, there = places_of(words, 6)
    at_places = np.take_along_axis(word_logits, np.asarray(places)[..., None], axis=1)
    np.testing.assert_allclose(
        pretraining_loss(at_places, next_logits, there, follows),
        pretraining_loss(word_logits, next_logits, words, follows),
        rtol=1e-14,
    )


def test_ignored_places_give_no_gradient(rng, x64):
    word_logits, next_logits, words, follows = losses(rng)
    gradient = jax.grad(pretraining_loss)(word_logits, next_logits, words, follows)
    np.testing.assert_array_equal((np.asarray(gradient) != 0).any(-1), words != IGNORED)


def test_the_loss_of_one_sequence_needs_no_batch(rng, x64):
    word_logits, next_logits, words, follows = losses(rng, B=1)
    alone = pretraining_loss(word_logits[0], next_logits[0], words[0], follows[0])
    assert alone == pretraining_loss(word_logits, next_logits, words, follows)


def test_without_a_word_the_loss_is_nan(rng):
    word_logits, next_logits, words, follows = losses(rng, dtype=np.float32)
    none = np.full_like(words, IGNORED)
    assert np.isnan(pretraining_loss(word_logits, next_logits, none, follows))


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, "must lie in 0 … 49 .*got 50", {"words": np.full((3, 6), C)}),
        (ValueError, "must lie in 0 … 49 .*got -1", {"words": np.full((3, 6), -1)}),
        (ValueError, "must lie in 0 … 1 .*got 2", {"follows": np.full(3, 2)}),
        (TypeError, "must be integers", {"follows": np.ones(3)}),
        (ValueError, r"got shape \(3, 5\)", {"words": np.full((3, 5), 4)}),
        (ValueError, r"got shape \(2,\)", {"follows": np.array([0, 1])}),
    ],
)
def test_labels_that_do_not_fit(error, match, changes, rng):
    names = "word_logits", "next_logits", "words", "follows"
    with pytest.raises(error, match=match):
        pretraining_loss(**dict(zip(names, losses(rng, dtype=np.float32), strict=True)) | changes)


@pytest.mark.torch
def test_the_loss_is_that_of_transformers(rng, x64):
    """Of their model in float64, with 0 for a text that follows."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=C, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    _, _, words, follows = losses(rng)
    with torch.no_grad():
        theirs = model(
            torch.tensor(rng.integers(0, C, words.shape)),
            labels=torch.tensor(words),
            next_sentence_label=torch.tensor(follows),
        )
    logits = theirs.prediction_logits.numpy(), theirs.seq_relationship_logits.numpy()
    found = pretraining_loss(*logits, words, follows)
    np.testing.assert_allclose(found, theirs.loss.item(), rtol=1e-12)


def test_a_key_is_one_choice_with_and_without_x64():
    tokens = rows(20, T=25)
    with jax.enable_x64(True):
        wide = mask_words(jax.random.key(0), tokens, SPECIAL, vocabulary=C)
    np.testing.assert_array_equal(
        wide, mask_words(jax.random.key(0), tokens, SPECIAL, vocabulary=C)
    )


def test_words_are_hidden_on_a_mesh_with_explicit_axes():
    tokens = rows(20, 21, T=25)
    expected = mask_words(jax.random.key(0), tokens, SPECIAL, vocabulary=C)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        placed = jax.device_put(tokens, NamedSharding(mesh, P("x")))
        found = mask_words(jax.random.key(0), placed, SPECIAL, vocabulary=C)
        assert all(each.sharding.spec[0] == "x" for each in found)
    np.testing.assert_array_equal(jax.device_get(found), expected)


def test_many_sentences_of_one_document_take_no_longer():
    """Sentences from elsewhere are drawn, not sought."""
    documents = [[[5]] * 3000, [[6]]]
    pairs, follows = sentence_pairs(documents, generator(0))
    assert {second[0] for (_, second), broken in zip(pairs, follows, strict=True) if broken} == {6}


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "rate must be more than 0", lambda x: hidden(x, SPECIAL, rate=0.0)),
        (ValueError, "special must lie in 0 … 49", lambda x: hidden(x, SPECIAL._replace(mask=103))),
        (TypeError, "pair 0 must be integers", lambda x: pack_pairs([([7.9], [5])], 8, SPECIAL)),
    ],
)
def test_what_would_be_wrong_in_silence(error, match, call):
    with pytest.raises(error, match=match):
        call(rows(2, T=25))


def hidden(tokens, special, **options):
    return mask_words(jax.random.key(0), tokens, special, vocabulary=C, **options)
