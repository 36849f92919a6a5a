"""A run end to end on a small text, and what it is made of: rows, caches, pictures, folders."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from rich.control import strip_control_codes

from experiments import language_model
from experiments.data import bytepair, packing
from experiments.training.runs import Run
from jattn import interop
from jattn.models import causal_lm

SETTINGS = "--steps 120 --features 32 --layers 2 --heads 4 --groups 2 --length 32 --seed 3"
SETTINGS += " --vocabulary 300 --learning-rate 0.01 --new-tokens 8"
NAMES = ("multi-head", "grouped-query", "multi-query", "converted", "converted, trained on")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Each sentence names somebody twice."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("data") / "text.txt"
    names = [a + b + "n" for a in "BDFGK" for b in "aeiou"]
    paragraphs = [
        " ".join(f"{(name := draw.choice(names))} met a friend of {name}." for _ in range(40))
        for _ in range(30)
    ]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished_run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "model"
    language_model.main(["--data", str(text), "--run-dir", str(folder), *SETTINGS.split()])
    return Run(folder)


@pytest.fixture(scope="module")
def scores(finished_run):
    return json.loads((finished_run.folder / "scores.json").read_text())


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        language_model.main([str(argument) for argument in arguments])
    return f"{stopped.value.code}{capsys.readouterr().err}"


@pytest.mark.slow
def test_fewer_heads_of_keys_lose_little_and_store_less(scores):
    models = scores["models"]
    assert tuple(models) == NAMES
    multi_head, grouped, multi_query = (models[name] for name in NAMES[:3])
    assert multi_head["loss"] < 0.6 * scores["unigram"]
    for other in (grouped, multi_query):
        assert other["loss"] < multi_head["loss"] + 0.1
        assert other["parameters"] < multi_head["parameters"]
    heads = [row["kv_heads"] for row in (multi_head, grouped, multi_query)]
    sizes = [row["cache_bytes"] for row in (multi_head, grouped, multi_query)]
    assert heads == [4, 2, 1]
    assert sizes == [multi_head["cache_bytes"] * K // 4 for K in heads]
    assert all(row["tokens_per_second"] > 0 for row in (multi_head, grouped, multi_query))


@pytest.mark.slow
def test_a_converted_model_is_made_good_by_a_short_training(scores):
    models = scores["models"]
    before, after = models["converted"]["loss"], models["converted, trained on"]["loss"]
    assert models["multi-head"]["loss"] < after < before
    assert models["converted"]["parameters"] == models["grouped-query"]["parameters"]


@pytest.mark.slow
def test_packed_documents_have_the_loss_that_they_have_alone(scores):
    assert scores["packed"]["loss"] == pytest.approx(scores["alone"]["loss"], rel=1e-6)
    assert scores["packed"]["rows"] < scores["alone"]["rows"]


@pytest.mark.slow
def test_pictures_and_a_folder_are_left(finished_run):
    for name in ("curve.png", "attention.png"):
        assert (finished_run.folder / name).read_bytes().startswith(b"\x89PNG")
    model, tokenizer = language_model.of_folder(finished_run.folder / "model")
    assert model.config.num_kv_heads == 4
    assert tokenizer.decode(tokenizer.encode("Ban met").ids) == "Ban met"


@pytest.mark.slow
def test_a_prompt_is_continued_by_the_checkpoint_and_by_the_folder_alike(finished_run, capsys):
    ask = ["--prompt", "Ban met a friend of", "--new-tokens", "3", "--temperature", "0"]
    language_model.main([*ask, "--run-dir", str(finished_run.folder)])
    one = capsys.readouterr().out
    language_model.main([*ask, "--model", str(finished_run.folder / "model")])
    assert capsys.readouterr().out == one
    assert one.startswith("Ban met a friend of ") and len(one) > 21


@pytest.mark.slow
def test_a_run_that_stopped_in_its_last_stage_ends_in_the_same_bits(finished_run, tmp_path):
    copy = Run(tmp_path / "copy")
    shutil.copytree(finished_run.folder, copy.folder)
    for stage, step in (("multi-query", "120"), ("converted-120", "12")):
        shutil.rmtree(copy.folder / stage / "checkpoints" / step)
    language_model.main(["--resume", "--run-dir", str(copy.folder)])
    for stage in (*language_model.STAGES, "converted-120"):
        one, other = (Run(run.folder / stage).checkpoints.newest() for run in (finished_run, copy))
        assert one.step == other.step
        for path, array in one.arrays.items():
            assert array.tobytes() == other.arrays[path].tobytes()


@pytest.mark.slow
def test_more_steps_extend_every_model_and_write_the_folder_anew(finished_run, tmp_path, capsys):
    copy = Run(tmp_path / "copy")
    shutil.copytree(finished_run.folder, copy.folder)
    shutil.rmtree(copy.folder / "multi-query" / "checkpoints" / "120")
    resume = ["--resume", "--run-dir", str(copy.folder)]
    assert "--steps 130 differs" in fails(capsys, *resume, "--steps", "130")  # one is unfinished
    language_model.main(resume)
    language_model.main([*resume, "--steps", "130"])
    for stage in language_model.STAGES:
        newest = Run(copy.folder / stage).checkpoints.newest()
        assert (newest.step, newest.metadata["ends"]) == (130, [120, 130])
    assert Run(copy.folder / "converted-130").checkpoints.newest().step == 13
    model, _ = language_model.of_folder(copy.folder / "model")
    old, _ = language_model.of_folder(finished_run.folder / "model")
    assert not np.array_equal(model.embedding.embedding[...], old.embedding.embedding[...])


@pytest.mark.slow
def test_packed_rows_train_too(text, tmp_path):
    arguments = ["--data", str(text), "--run-dir", str(tmp_path / "run"), *SETTINGS.split()]
    language_model.main([*arguments, "--packed", "--steps", "40"])
    rows = Run(tmp_path / "run" / "multi-head").metrics.read()
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.torch
def test_transformers_reads_the_model_of_a_run(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    settings = language_model.Settings(features=32, heads=4, layers=2)
    model = language_model.build(settings, 300, "grouped-query")
    interop.save_pretrained(model, tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = np.arange(2, 40)[None]
    with torch.no_grad():
        expected = other(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(tokens), expected, atol=2e-5)


SMALL = language_model.Settings(length=8, batch_size=3, heads=4, features=8)
TEXTS = [list(range(5, 20)), [7, 8], list(range(9, 30))]


@pytest.mark.parametrize("packed", [False, True])
def test_batches_of_a_step_are_the_same_wherever_one_begins(packed):
    settings = language_model.Settings(length=8, batch_size=2, heads=4, features=8, packed=packed)
    batches = language_model.Batches(TEXTS, settings)
    stream = batches(0)
    whole = [next(stream) for _ in range(5)]
    for step, expected in enumerate(whole):
        found = next(batches(step))
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        assert (found.segments is None) is not packed
    assert not np.array_equal(whole[0].tokens, whole[1].tokens)


def test_a_text_shorter_than_a_batch_is_repeated_and_one_shorter_than_a_row_refused():
    batch = next(language_model.Batches([[5, 6, 7, 8, 9, 10, 11]], SMALL)(0))
    assert batch.tokens.shape == (3, 8)
    with pytest.raises(
        language_model.BadInput, match="the text has 4 tokens, too few for one of 8"
    ):
        language_model.Batches([[5, 6, 7]], SMALL)


def model_of(kv_heads=None):
    config = causal_lm.Config(40, 16, 2, 4, kv_heads, mlp_features=32)
    return causal_lm.CausalLM(config, rngs=nnx.Rngs(0))


def test_the_loss_of_rows_does_not_depend_on_the_last_batch(monkeypatch):
    rows, model = packing.alone(TEXTS, 8), model_of()
    whole = language_model.evaluate(model, rows)
    monkeypatch.setattr(language_model, "EVALUATION_BATCH", 4)
    assert len(rows.tokens) % 4
    assert language_model.evaluate(model, rows) == pytest.approx(whole, rel=1e-6)


def test_a_cache_holds_keys_and_values_of_every_layer():
    assert language_model.cache_bytes(model_of(), 10) == 2 * 2 * 10 * 16 * 4
    assert language_model.cache_bytes(model_of(1), 10) == 2 * 2 * 10 * 4 * 4


def test_the_weights_in_the_picture_are_those_of_the_model():
    model, ids = model_of(2), TEXTS[0]
    layers = language_model.attention(model, ids)
    assert [each.shape for each in layers] == [(4, 15, 15)] * 2
    for each in layers:
        np.testing.assert_allclose(each.sum(axis=-1), 1, rtol=1e-5)
        assert not np.triu(each, 1).any()


def test_a_text_is_printed_as_it_comes(capsys):
    tokenizer = bytepair.train(["Größe 大きさ " * 9], 270)
    config = causal_lm.Config(tokenizer.get_vocab_size(), 16, 1, 2, mlp_features=16)
    model = causal_lm.CausalLM(config, rngs=nnx.Rngs(0))
    options = {"max_new_tokens": 12, "temperature": 1.0, "key": jax.random.key(0)}
    prompt = "[b]Größe 大"
    text = language_model.stream(model, tokenizer, prompt, Console(width=20), **options)
    assert capsys.readouterr().out == f"{prompt}{strip_control_codes(text)}\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--groups 3", "--groups must divide --heads 8"),
        ("--model x", "--model continues a text: give it by --prompt"),
        ("--model x --prompt a", "x is no folder"),
        ("--model x --prompt a --resume", "--resume means nothing with --model"),
        ("--model x --prompt a --layers 9", "--layers means nothing with --model"),
        ("--model x --prompt a --run-dir x", "--run-dir means nothing with --model"),
        ("--temperature 0.5", "--temperature is for --prompt"),
        ("--prompt a --temperature inf", "--temperature must be finite, got inf"),
        ("--prompt \udcff", "--prompt must be UTF-8 text"),
        ("--groups 8", "neither 1 nor all"),
        ("--heads 2", "--heads must be no prime number, for groups share them, got 2"),
        ("--heads 1", "--heads must be no prime number, for groups share them, got 1"),
        ("--model x --prompt a --features 9", "--features means nothing with --model"),
        ("--model . --prompt a", ". holds no tokenizer.json"),
        ("--prompt a", "no checkpoint in runs/language_model"),
        ("--prompt a --temperature -1", "--temperature must be at least 0, got -1.0"),
        ("--vocabulary 256", "a vocabulary of 256 is too small"),
    ],
)
def test_bad_options(capsys, tmp_path, monkeypatch, option, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *option.split())


def test_a_run_of_another_experiment(tmp_path, capsys):
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    for stage, other in (("", "pretrain_bert"), ("multi-head", "another_model")):
        folder = tmp_path / other
        Run(folder / stage).checkpoints.save(3, state, {"experiment": other})
        message = fails(capsys, "--prompt", "a", "--run-dir", folder)
        assert "is not a run of this experiment, language_model" in message


def test_another_seed_draws_another_text_from_the_same_run():
    before = language_model.Settings()
    asks = language_model.Settings(prompt="a", seed=3)
    asks.check_continues(before, Path("run"), finished=True)
    resumes = language_model.Settings(resume=True, seed=3)
    with pytest.raises(language_model.BadInput, match="--seed 3 differs from the checkpoint's, 0"):
        resumes.check_continues(before, Path("run"), finished=False)


def test_a_folder_of_another_model(tmp_path, capsys):
    bytepair.train(["a b"], 260).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "vocab_size": 30}')
    message = fails(capsys, "--model", tmp_path, "--prompt", "a")
    assert "error: " in message and "bert" in message.lower()
