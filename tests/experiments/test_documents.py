"""Documents, their parts and their rows: nothing is lost, nothing is read twice, no text leaks."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import BadInput
from experiments.data import bytepair, documents, packing
from experiments.data.ngrams import Neighbours
from jattn import masks
from jattn.models import causal_lm
from jattn.models.pretraining import IGNORED


@pytest.fixture(scope="module")
def parts():
    return documents.split(documents.python_documentation(), seed=0)


def test_no_paragraph_of_the_documentation_stands_in_two_parts(parts):
    words = [{" ".join(text.split()) for document in part for text in document} for part in parts]
    assert all(words)
    for one, other in itertools.combinations(words, 2):
        assert not one & other


def test_a_tenth_each_is_held_out_and_the_seed_decides(parts):
    sizes = [len(part) for part in parts]
    assert sizes[1] == sizes[2] == round(0.1 * sum(sizes))
    other = documents.split(documents.python_documentation(), seed=1)
    assert [len(part) for part in other] == sizes
    assert other != parts
    assert documents.split(documents.python_documentation(), seed=0) == parts


def test_sections_hold_every_paragraph_once():
    document = tuple(f"{i} " * 40 for i in range(100))
    sections = documents.cut(document)
    assert [text for section in sections for text in section] == list(document)
    assert len(sections) > 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected paragraphs of text, got an empty file"),
        (b" \n\n \n", "expected paragraphs of text, got an empty file"),
        (b"abc \xff", "expected UTF-8 text, got byte 0xff"),
        (b"A short text.", "at least 3 sections of 1500 characters"),
        (b"the same\n\n" * 1000, "at least 3 sections of 1500 characters"),
    ],
)
def test_a_file_that_is_no_text_to_learn_from(tmp_path, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        documents.split(documents.read_documents(path), seed=0)


def test_sentences_end_at_marks_that_a_capital_follows():
    assert documents.sentences(("See e.g. this. It ends! Is it? 3 follow: (Yes)",)) == [
        "See e.g. this.", "It ends!", "Is it?", "3 follow:", "(Yes)",
    ]  # fmt: skip
    assert documents.sentences(("Это текст. Это ещё один. Élan vital.",)) == [
        "Это текст.", "Это ещё один.", "Élan vital.",
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_every_way(end):
    assert documents.paragraphs(end.join(["One", "line.", "", "Another."])) == (
        "One line.", "Another.",
    )  # fmt: skip


TEXTS = [[5, 6, 7, 8, 9], [10], [11, 12], [13, 14, 15]]


def read(rows):
    """What is predicted after each token, as pairs."""
    real = rows.targets != IGNORED
    return sorted(zip(rows.tokens[real].tolist(), rows.targets[real].tolist(), strict=True))


def test_every_token_is_predicted_once_however_documents_are_laid_out():
    expected = sorted(
        pair for text in TEXTS for pair in itertools.pairwise([packing.END, *text, packing.END])
    )
    assert read(packing.alone(TEXTS, 4)) == expected
    assert read(packing.packed(TEXTS, 4)) == expected
    assert read(packing.windows(TEXTS, 3)) == expected
    assert len(packing.packed(TEXTS, 4).tokens) == 4 < len(packing.alone(TEXTS, 4).tokens)


def test_windows_begin_where_they_are_told():
    whole = packing.windows(TEXTS, 15)
    later = packing.windows(TEXTS, 5, offset=2)
    np.testing.assert_array_equal(later.tokens.ravel(), whole.tokens[0, 2:12])
    np.testing.assert_array_equal(later.targets.ravel(), whole.targets[0, 2:12])
    with pytest.raises(BadInput, match="the text has 15 tokens, too few for one of 16"):
        packing.windows(TEXTS, 16)


def test_a_piece_in_a_packed_row_has_the_logits_that_it_has_alone():
    config = causal_lm.Config(16, features=16, num_layers=2, num_heads=2, mlp_features=32)
    model = causal_lm.CausalLM(config, rngs=nnx.Rngs(0))
    alone, packed = packing.alone(TEXTS, 6), packing.packed(TEXTS, 6)
    found = model(
        jnp.asarray(packed.tokens), mask=masks.segments(jnp.asarray(packed.segments)),
        positions=jnp.asarray(packed.positions),
    )  # fmt: skip
    expected = model(jnp.asarray(alone.tokens))
    pieces = {
        tuple(row[real].tolist()): logits[real]
        for row, logits, targets in zip(alone.tokens, expected, alone.targets, strict=True)
        if (real := targets != IGNORED).any()
    }
    seen = 0
    for row, numbers, logits in zip(packed.tokens, packed.segments, found, strict=True):
        for number in range(1, numbers.max() + 1):
            piece = numbers == number
            np.testing.assert_allclose(logits[piece], pieces[tuple(row[piece].tolist())], atol=1e-6)
            seen += 1
    assert seen == len(TEXTS)


def test_a_tokenizer_reads_back_every_text_and_is_the_same_each_time():
    texts = ["the cat sat on the mat. " * 3, "  x = {'ключ': '値'}\n\n"]
    one, other = (bytepair.train(texts, 300) for _ in range(2))
    assert one.to_str() == other.to_str()
    for text in (*texts, "never seen: \t ☃ <|en|>"):
        assert one.decode(one.encode(text).ids) == text
    assert one.token_to_id(bytepair.END) == packing.END
    assert one.encode("a<|end|>b").ids.count(packing.END) == 1
    with pytest.raises(BadInput, match="a vocabulary of 256 is too small"):
        bytepair.train(texts, 256)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(BadInput, match=r"holds no tokenizer.json"):
        bytepair.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="is no tokenizer"):
        bytepair.load(tmp_path)


def test_a_guess_by_neighbours_takes_the_longest_gram_that_was_seen():
    guess = Neighbours([[1, 2, 3], [1, 4, 3], [1, 4, 5], [6, 7], [6, 7], [6, 7], [6, 7]])
    assert guess(1, 5) == 4
    assert guess(1, 9) == 4
    assert guess(9, 9) == 6
