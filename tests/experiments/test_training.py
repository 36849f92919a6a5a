"""Run folders, checkpoints, the loop and the pictures, on a model of a few weights."""

import dataclasses
import io
import itertools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from experiments import BadInput
from experiments.data import dates
from experiments.training import fonts, pictures
from experiments.training.accumulation import Sum, cross_entropies, value_and_gradients
from experiments.training.checkpoints import Checkpoints, fill, restore
from experiments.training.loop import Recipe, _progress, train
from experiments.training.runs import Metrics, Run

QUIET = Console(quiet=True)


class Network(nnx.Module):
    """Two layers with dropout, whose random stream has to be restored too."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 7, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.second = nnx.Linear(7, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.second(self.dropout(nnx.tanh(self.first(inputs))))


def loss(model, batch):
    inputs, targets = batch
    return ((model(inputs) - targets) ** 2).mean()


def batches(step):
    for number in itertools.count(step):
        inputs = np.random.default_rng(number).normal(size=(11, 3)).astype(np.float32)
        yield inputs, inputs.sum(axis=1, keepdims=True)


RECIPE = Recipe.adam(23, 3e-2, log_every=2, checkpoint_every=5)


def run_to_the_end(folder, checkpoint=None, batches=batches, recipe=RECIPE):
    run, model = Run(folder), Network(nnx.Rngs(0))
    finished = train(
        model,
        loss,
        batches,
        recipe,
        run,
        checkpoint=checkpoint,
        metadata={"name": "мая"},
        console=QUIET,
    )
    return finished, jax.tree.leaves(nnx.state(model)), run


def weights(leaves):
    return [
        np.asarray(jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x)
        for x in leaves
    ]


def assert_same_bits(left, right):
    for one, other in zip(weights(left), weights(right), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    _, leaves, run = run_to_the_end(folder)
    return folder, leaves, run


@pytest.fixture
def copied_run(finished_run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished_run[0], folder)
    return Run(folder)


def damage(checkpoints, step, how):
    files = [path for path in (checkpoints.folder / str(step)).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    if how == "truncate":
        for path in files:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "flip":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 0xFF
        largest.write_bytes(bytes(content))
    elif how == "empty folder":
        shutil.rmtree(checkpoints.folder / str(step))
        (checkpoints.folder / str(step)).mkdir()
    elif how == "no metadata":
        shutil.rmtree(checkpoints.folder / str(step) / "saved")


def test_training_learns_and_keeps_the_last_checkpoints(finished_run):
    _, _, run = finished_run
    rows = run.metrics.read()
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 23]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["learning_rate"] == pytest.approx(float(RECIPE.schedule(22)))
    assert run.checkpoints.steps() == [15, 20, 23]
    assert run.checkpoints.newest().metadata == {"name": "мая", "pending": []}


def test_training_equals_a_loop_without_any_of_it(finished_run):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, RECIPE.transform, wrt=nnx.Param)

    @nnx.jit
    def update(model, optimizer, batch):
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, nnx.grad(loss)(model, batch))

    for batch in itertools.islice(batches(0), RECIPE.steps):
        update(model, optimizer, batch)
    for one, other in zip(
        weights(jax.tree.leaves(nnx.state(model))), weights(finished_run[1]), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_resumed_run_ends_in_the_same_bits_and_the_same_metrics(finished_run, copied_run):
    _, leaves, run = finished_run
    shutil.rmtree(copied_run.checkpoints.folder / "23")
    shutil.rmtree(copied_run.checkpoints.folder / "20")
    with copied_run.metrics.path.open("a") as file:
        file.write('{"step": 9')  # cut short by a kill
    finished, resumed, _ = run_to_the_end(copied_run.folder, copied_run.checkpoints.newest())
    assert finished
    assert_same_bits(leaves, resumed)
    assert copied_run.metrics.read() == run.metrics.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_leaves_a_checkpoint_that_continues_to_the_same_bits(
    finished_run, tmp_path, number
):
    def interrupted(step):
        for i, batch in enumerate(batches(step)):
            if i == 7:
                os.kill(os.getpid(), number)
            yield batch

    before = signal.getsignal(number)
    finished, _, run = run_to_the_end(tmp_path, batches=interrupted)
    assert not finished and signal.getsignal(number) is before
    assert run.checkpoints.steps() == [0, 5, 8]
    finished, resumed, _ = run_to_the_end(tmp_path, run.checkpoints.newest())
    assert finished
    assert_same_bits(finished_run[1], resumed)
    assert run.metrics.read() == finished_run[2].metrics.read()


@pytest.fixture
def interruptible():
    """SIGINT raises, even in a process that was started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_acts_at_once_and_earlier_checkpoints_stay(tmp_path):
    def twice(step):
        for i, batch in enumerate(batches(step)):
            if i == 7:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            yield batch

    with pytest.raises(KeyboardInterrupt):
        run_to_the_end(tmp_path, batches=twice)
    assert Run(tmp_path).checkpoints.newest().step == 5


def test_diverging_loss_stops_and_saves_nothing_broken(tmp_path):
    def broken(step):
        for number, (inputs, targets) in zip(itertools.count(step), batches(step), strict=False):
            yield inputs, targets * (np.float32(np.nan) if number == 11 else np.float32(1))

    with pytest.raises(
        BadInput, match="the loss became nan before step 12: lower the learning rate"
    ):
        run_to_the_end(tmp_path, batches=broken)
    assert Run(tmp_path).checkpoints.steps() == [0, 5, 10]


def test_loss_is_traced_once_for_each_shape(tmp_path):
    traces = []

    def counted(model, batch):
        traces.append(batch[0].shape)
        return loss(model, batch)

    def two_shapes(step):
        for number, (inputs, targets) in zip(itertools.count(step), batches(step), strict=False):
            yield (inputs[:5], targets[:5]) if number % 2 else (inputs, targets)

    train(Network(nnx.Rngs(0)), counted, two_shapes, RECIPE, Run(tmp_path), console=QUIET)
    assert sorted(traces) == [(5, 3), (11, 3)]


@pytest.mark.parametrize("how", ["truncate", "flip", "empty folder", "no metadata"])
def test_damaged_checkpoint_falls_back_to_an_intact_one(finished_run, copied_run, how):
    damage(copied_run.checkpoints, 23, how)
    said = []
    checkpoint = copied_run.checkpoints.newest(say=said.append)
    assert checkpoint.step == 20
    assert len(said) == 1 and "23 is damaged" in said[0]
    assert copied_run.checkpoints.steps() == [15, 20, 23]
    _, resumed, _ = run_to_the_end(copied_run.folder, checkpoint)
    assert_same_bits(finished_run[1], resumed)
    assert copied_run.checkpoints.steps() == [15, 20, 23]
    assert [path.name for path in (copied_run.folder / "damaged").iterdir()] == ["23-0"]


def test_half_written_checkpoint_is_not_taken_for_one(copied_run):
    checkpoints = copied_run.checkpoints
    half = checkpoints.folder / "27.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints.folder / "23" / "state", half / "state")
    assert checkpoints.newest(say=pytest.fail).step == 23
    state = nnx.state(Network(nnx.Rngs(0)))
    checkpoints.save(27, state, {})
    assert checkpoints.newest(say=pytest.fail).step == 27


def test_no_intact_checkpoint(copied_run, tmp_path):
    for step in (15, 20, 23):
        damage(copied_run.checkpoints, step, "truncate")
    said = []
    with pytest.raises(BadInput, match="no intact checkpoint"):
        copied_run.checkpoints.newest(say=said.append)
    assert len(said) == 3
    with pytest.raises(BadInput, match="no checkpoint in"):
        Checkpoints(tmp_path / "nothing").newest()
    assert not (tmp_path / "nothing").exists()


def test_checkpoint_of_another_model_names_what_differs(finished_run):
    arrays = finished_run[2].checkpoints.newest().arrays
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    with pytest.raises(BadInput, match=r"does not fit .*0/first/bias"):
        fill(nnx.state((model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param))), arrays)


def test_a_run_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [str(Run.create(None, "task").folder) for _ in range(2)] == [
        "runs/task/001",
        "runs/task/002",
    ]
    with pytest.raises(BadInput, match="no checkpoint in runs"):
        Run.open(None, "task")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes").write_text("mine")
    with pytest.raises(BadInput, match="holds something already"):
        Run.create(full, "task")
    with pytest.raises(BadInput, match=r"notes: (File exists|Not a directory)"):
        Run.create(full / "notes", "task")


def test_the_newest_run_with_a_checkpoint_is_opened(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, _ = Run.create(None, "task"), Run.create(None, "task")
    shutil.copytree(finished_run[2].checkpoints.folder, first.checkpoints.folder)
    assert Run.open(None, "task") == first


def test_metrics_are_json_lines(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(5):
        metrics.write(step=step, loss=step / 2)
    metrics.rewind(3)
    lines = metrics.path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_every_character_of_the_dates_has_a_glyph():
    written = "".join(text for side in dates.dates(997, 2) for pair in side for text in pair)
    assert set(written.replace(" ", "␣")) <= fonts.glyphs()


def test_no_picture_of_nothing(tmp_path):
    pictures.alignments(
        [pictures.Alignment("", "abc", "", np.zeros((0, 3)))], tmp_path / "alignment.png"
    )
    assert not list(tmp_path.iterdir())


def test_pictures_are_drawn_without_a_missing_glyph(tmp_path):
    # Matplotlib warns of every glyph that it cannot find, and a warning fails a test.
    panels = [
        pictures.Alignment(f"{text} → 12", text, "12", np.full((2, len(text)), 1 / len(text)))
        for text in ("3 мая", "Μαΐου", "5月3日", "5월 3일", "$x$ \\frac{", "ก\x01", "long " * 30)
    ]
    before = dict(matplotlib.rcParams)
    pictures.alignments(panels, tmp_path / "alignment.png")
    pictures.curve(
        [{"step": i, "loss": 1 / i, "learning_rate": 0.1} for i in (1, 2, 3)],
        tmp_path / "curve.png",
    )
    assert dict(matplotlib.rcParams) == before
    for name in ("alignment.png", "curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def tokens_of(step):
    """Batches of which the first part has no target."""
    for number in itertools.count(step):
        random = np.random.default_rng(number)
        inputs = random.normal(size=(12, 3)).astype(np.float32)
        yield inputs, inputs.sum(axis=1), (random.random(12) < (np.arange(12) - 4) / 8)


def means(model, batch):
    inputs, targets, real = batch
    errors = (model(inputs)[:, 0] - targets) ** 2
    return [
        Sum(jnp.sum(errors, where=real), real.sum()),
        Sum(jnp.sum(jnp.abs(errors)), len(errors)),
    ]


def test_a_part_without_targets_adds_nothing():
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    inputs = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    targets = np.array([[-1, -1], [-1, -1], [3, -1], [4, 0]])

    def loss(model, batch):
        return [cross_entropies(model(batch[0]), batch[1], ignored=-1)]

    whole = value_and_gradients(loss, model, (inputs, targets), 1)
    parts = value_and_gradients(loss, model, (inputs, targets), 2)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole(parts):
    model = Network(nnx.Rngs(0))
    model.eval()
    batch = next(tokens_of(0))
    step = nnx.jit(value_and_gradients, static_argnums=(0, 3))
    whole, gradients = step(means, model, batch, 1)
    total, others = step(means, model, batch, parts)
    np.testing.assert_allclose(total, whole, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=1e-6)


def test_accumulated_steps_continue_to_the_same_bits(tmp_path):
    recipe = dataclasses.replace(RECIPE, accumulate=3)

    def rows(step):
        return ((inputs, targets[:, None]) for inputs, targets, _ in tokens_of(step))

    _, whole, _ = run_to_the_end(tmp_path / "whole", batches=rows, recipe=recipe)
    _, _, run = run_to_the_end(
        tmp_path / "parts", batches=rows, recipe=dataclasses.replace(recipe, steps=10)
    )
    _, resumed, _ = run_to_the_end(
        tmp_path / "parts", run.checkpoints.newest(), batches=rows, recipe=recipe
    )
    assert_same_bits(whole, resumed)
    with pytest.raises(BadInput, match="--accumulate 3 must divide the batch of 11"):
        run_to_the_end(tmp_path / "uneven", recipe=recipe)


def test_layers_that_compute_again_train_alike_and_their_checkpoints_fit_the_model(tmp_path):
    recipe = dataclasses.replace(RECIPE, remat=(Network,))
    _, whole, _ = run_to_the_end(tmp_path / "whole")
    _, again, run = run_to_the_end(tmp_path / "again", recipe=recipe)
    for one, other in zip(weights(whole), weights(again), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-7)
    restore(Network(nnx.Rngs(0)), run.checkpoints.newest())


def test_the_rate_of_an_extended_run_begins_anew():
    schedule = Recipe.adam([20, 50], 1.0).schedule
    first, second = Recipe.adam(20, 1.0).schedule, Recipe.adam(30, 1.0).schedule
    assert [schedule(i) for i in range(20)] == [first(i) for i in range(20)]
    assert [schedule(20 + i) for i in range(31)] == [second(i) for i in range(31)]


def shown(console, steps, start=0, each=1):
    """What a terminal shows of the bar, after a step and at the end."""
    seen = []
    with _progress(console, steps, start) as show:
        for step in range(start, steps):
            show.step(step, [])
            if step - start == each:
                seen.append(text_of(show))
        if steps > start:
            show.numbers(steps, "loss 0.5000")
            seen.append(text_of(show))
    return seen


def text_of(show):
    console = Console(width=120, file=io.StringIO())
    console.print(show.bar.make_tasks_table(show.bar.tasks))
    return console.file.getvalue()


def test_the_bar_says_that_it_compiles_until_a_step_has_ended_and_then_how_long_it_took():
    console = Console(force_terminal=True, width=120, file=io.StringIO())
    with _progress(console, 30, 0) as show:
        assert "compiling …" in text_of(show)
    running, finished = shown(console, 30, each=3)
    assert "compiling" not in running and "3/30" in running
    assert "compiling" not in finished and "30/30" in finished and "0:00:00" in finished
    assert shown(console, 30, start=30) == []
