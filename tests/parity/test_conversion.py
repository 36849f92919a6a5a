import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx

from jattn import interop, models, nn
from jattn.parity.cli import main

FACTORIES = """
import jax.numpy as jnp
from flax import nnx
from jattn import interop, models, nn


def lm():
    config = models.causal_lm.Config(11, features=8, num_layers=2, num_heads=2, mlp_features=12)
    return models.CausalLM(config, rngs=nnx.Rngs(3))


def attention():
    return nn.MultiHeadAttention(2, 8, use_bias=True, dropout_rate=0.1, rngs=nnx.Rngs(3))


class Net(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(3, 2, rngs=nnx.Rngs(3))
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(3))


def plain():
    return Net()


def net():
    return Net(), {"rules": interop.within(interop.torch_rules(nnx.Linear), "out", "fc")}


def wide():
    return nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(3))


def number():
    return 3


def normed():
    return nnx.BatchNorm(3, rngs=nnx.Rngs(3))


def paired():
    return Net(), {"pairs": {"out": "fc"}}


class Scaled(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.float32(3.0))


def scaled():
    return Scaled(), {"rules": [interop.Rule("logit_scale", "scale")]}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with factories."""
    (tmp_path / "make.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(*words):
    assert main(["convert", *map(str, words)]) == 0


def lm(**changes):
    config = models.causal_lm.Config(11, features=8, num_layers=2, num_heads=2, mlp_features=12)
    return models.CausalLM(config, rngs=nnx.Rngs(0), **changes)


def same_weights(one, other):
    one, other = (nnx.to_flat_state(nnx.state(each, nnx.Param)) for each in (one, other))
    return all(
        path == again and x[...].dtype == y[...].dtype and bool((x[...] == y[...]).all())
        for (path, x), (again, y) in zip(one, other, strict=True)
    )


def restored(model, path):
    """The model as Orbax itself fills it."""
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(model, checkpointer.restore(path.absolute(), nnx.state(model, nnx.Param)))
    return model


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_folder_of_transformers_to_flax_and_back_to_the_same_bytes(here, dtype):
    model = lm(param_dtype=dtype)
    interop.save_pretrained(model, here / "lm")
    converted("lm", "--to", "flax", "-o", "flax")
    assert same_weights(restored(lm(param_dtype=dtype), here / "flax"), model)
    converted("lm", "--to", "torch", "-o", "lm.safetensors")
    written = safetensors.numpy.load_file(here / "lm.safetensors")
    expected = safetensors.numpy.load_file(here / "lm" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(written[name].tobytes() == expected[name].tobytes() for name in expected)


def test_what_is_no_weights_is_not_copied_and_named(here, capsys):
    interop.save_pretrained(lm(), here / "lm")
    (here / "lm" / "vocab.txt").write_text("a\nb\n")
    converted("lm", "--to", "hf", "-o", "again")
    assert "not copied, for they are no weights: vocab.txt\n" in capsys.readouterr().out
    converted("lm", "--to", "flax", "-o", "flax")
    assert "not copied" not in capsys.readouterr().out


def test_flax_to_a_folder_of_transformers(here):
    model = lm()
    interop.save_pretrained(model, here / "lm")
    converted("lm", "--to", "flax", "-o", "flax")
    converted("flax", "--to", "hf", "--module", "make.py:lm", "-o", "again")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (here / "lm" / name).read_bytes() == (here / "again" / name).read_bytes()
    assert same_weights(interop.load_pretrained(here / "again"), model)


def test_a_state_dict_of_any_module_by_rules_of_its_own(here, capsys):
    weights = {"out.weight": np.arange(6.0).reshape(2, 3), "out.bias": np.ones(2)}
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    safetensors.numpy.save_file(weights, here / "net.safetensors")
    converted("net.safetensors", "--to", "flax", "--module", "make.py:net", "-o", "flax")
    shown = capsys.readouterr().out
    assert "out.weight   fc.kernel        2 × 3     3 × 2   float32" in shown
    assert "Net: 2 parameters, 8 numbers" in shown and "the same bits" in shown
    converted("flax", "--to", "torch", "--module", "make.py:net", "-o", "again.safetensors")
    again = safetensors.numpy.load_file(here / "again.safetensors")
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


@pytest.mark.torch
def test_a_pickle_of_pytorch_is_what_load_state_dict_takes_again(here):
    import safetensors.torch
    import torch

    layer = torch.nn.MultiheadAttention(8, 2)
    torch.save(layer.state_dict(), here / "layer.pt")
    converted("layer.pt", "--to", "flax", "--module", "make.py:attention", "-o", "flax")
    words = "--to", "torch", "--module", "make.py:attention", "-o", "layer.safetensors"
    converted("flax", *words, "--names", "torch.nn.MultiheadAttention")
    again = safetensors.torch.load_file(here / "layer.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in layer.state_dict().items())
    torch.nn.MultiheadAttention(8, 2).load_state_dict(again)


def test_other_names_for_the_same_weights(here, capsys):
    module = nn.MultiHeadAttention(2, 8, use_bias=True, rngs=nnx.Rngs(0))
    safetensors.numpy.save_file(interop.to_torch(module), here / "a.safetensors")
    words = "--to", "torch", "--module", "make.py:attention", "-o", "b.safetensors"
    converted("a.safetensors", *words, "--names", "torch.nn.MultiheadAttention")
    shown = capsys.readouterr().out
    assert "in_proj_weight" in shown and "W_q" not in shown
    assert "in_proj_weight" in safetensors.numpy.load_file(here / "b.safetensors")


def test_float64_and_not_a_number_stay_as_they_are(here):
    weights = {"weight": np.full((2, 3), np.nan), "bias": np.array([1 / 3, -0.0])}
    safetensors.numpy.save_file(weights, here / "a.safetensors")
    converted("a.safetensors", "--to", "flax", "--module", "make.py:wide", "-o", "flax")
    converted("flax", "--to", "torch", "--module", "make.py:wide", "-o", "b.safetensors")
    again = safetensors.numpy.load_file(here / "b.safetensors")
    assert all(again[name].tobytes() == array.tobytes() for name, array in weights.items())


def test_a_folder_of_bert_with_old_names(here, capsys):
    model = models.BertForSequenceClassification(
        models.bert.Config(11, features=8, num_layers=1, num_heads=2, mlp_features=12, classes=3),
        rngs=nnx.Rngs(0),
    )
    interop.save_pretrained(model, here / "bert")
    file = here / "bert" / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor
        for name, tensor in safetensors.numpy.load_file(file).items()
    }
    safetensors.numpy.save_file(old, file)
    converted("bert", "--to", "flax", "-o", "flax")
    shown = capsys.readouterr().out
    assert "bert.embeddings.LayerNorm.weight" in shown and "classifier.weight" in shown
    assert same_weights(restored(interop.load_pretrained(here / "bert"), here / "flax"), model)


def test_a_parameter_that_is_one_number(here):
    weights = {"logit_scale": np.array(2.5, np.float32)}
    safetensors.numpy.save_file(weights, here / "a.safetensors")
    converted("a.safetensors", "--to", "torch", "--module", "make.py:scaled", "-o", "b.safetensors")
    again = safetensors.numpy.load_file(here / "b.safetensors")["logit_scale"]
    assert again.shape == () and again == 2.5


def test_nothing_is_left_of_what_cannot_be_written_or_appears_meanwhile(here, capsys, monkeypatch):
    interop.save_pretrained(lm(), here / "lm")
    monkeypatch.setattr("jattn.parity.conversion._check_same", lambda *_: (here / "x").mkdir())
    before = {path.name for path in here.iterdir()}
    assert main(["convert", "lm", "--to", "flax", "-o", "x"]) == 2
    assert "x exists by now" in capsys.readouterr().err
    assert {path.name for path in here.iterdir()} == before | {"x"} and not [
        *(here / "x").iterdir()
    ]


@pytest.mark.parametrize("names", [("a.b", "a"), ("kernel", "kernel.value")])
def test_two_arrays_of_one_path(here, capsys, names):
    first, second = names
    tree = {first: jnp.ones(2), second: {"b": jnp.zeros(2)} if second == "a" else jnp.zeros(2)}
    save(here / "flax", tree)
    assert (
        main(
            ["convert", "flax", "--to", "torch", "-o", "x.safetensors", "--module", "make.py:wide"]
        )
        == 2
    )
    assert "has two arrays of the path" in capsys.readouterr().err


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


@pytest.mark.parametrize("kind", ["state", "pure"])
def test_the_model_within_a_training_state(here, kind, capsys):
    model = lm()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    state = {"model": nnx.state(model), "optimizer": nnx.state(optimizer), "step": 7}
    save(here / "run", state if kind == "state" else jax.tree.map(jnp.asarray, nnx.to_pure_dict(
        nnx.State(state)) | {"step": 7}))  # fmt: skip
    words = "convert", "run", "--to", "hf", "--module", "make.py:lm", "-o", "lm"
    assert main([*words]) == 2
    error = capsys.readouterr().err
    assert "arrays of these names are in the part model" in error and "optimizer." in error
    assert main([*words, "--part", "nothing"]) == 2
    assert "expected a part of the checkpoint, such as model" in capsys.readouterr().err
    converted(*words[1:], "--part", "model")
    assert same_weights(interop.load_pretrained(here / "lm"), model)


def test_of_a_training_state_only_the_part_is_read(here, monkeypatch):
    save(here / "run", {"model": nnx.state(lm()), "huge": jnp.zeros(10)})
    asked = []
    restore = ocp.PyTreeCheckpointer.restore

    def watched(self, path, args):
        leaves = jax.tree.leaves(args.item, is_leaf=lambda leaf: leaf is ocp.PLACEHOLDER)
        asked.append([leaf.name for leaf in leaves if leaf is not ocp.PLACEHOLDER])
        return restore(self, path, args)

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", watched)
    converted("run", "--to", "hf", "--module", "make.py:lm", "--part", "model", "-o", "lm")
    assert len(asked) == len(nnx.to_flat_state(nnx.state(lm(), nnx.Param)))
    assert all(len(names) == 1 and names[0].startswith("model.") for names in asked)


def test_random_streams_of_a_saved_state_are_no_weights(here):
    module = nn.MultiHeadAttention(2, 8, use_bias=True, dropout_rate=0.1, rngs=nnx.Rngs(0))
    save(here / "flax", nnx.state(module))
    words = "--to", "torch", "--module", "make.py:attention", "-o", "a.safetensors"
    converted("flax", *words)
    again = nn.MultiHeadAttention(2, 8, use_bias=True, rngs=nnx.Rngs(1))
    interop.load_torch(again, safetensors.numpy.load_file(here / "a.safetensors"))
    assert same_weights(again, module)


def test_the_report_as_json(here):
    interop.save_pretrained(lm(), here / "lm")
    converted("lm", "--to", "flax", "-o", "flax", "--json", "report.json")
    report = json.loads((here / "report.json").read_text())
    assert report["module"] == "CausalLM" and report["to"] == "flax"
    rows = {row["flax"]: row for row in report["parameters"]}
    row = rows["layers.1.mlp.down.kernel"]
    assert row["torch"] == ["model.layers.1.mlp.down_proj.weight"]
    assert row["torch_shape"] == [8, 12] and row["shape"] == [12, 8]


BAD = [
    ("nowhere --to flax -o x", "no such checkpoint: nowhere"),
    ("lm --to torch -o net.safetensors", "net.safetensors exists already"),
    ("lm --to flax -o lm", "lm exists already"),
    ("lm --to flax -o no/x", "--output no/x lies in no folder"),
    ("lm --to torch -o x", "--to torch writes a file whose name ends in .safetensors, got -o x"),
    ("lm --to torch -o x.pt", "ends in .safetensors, got -o x.pt"),
    ("lm --to hf -o x.safetensors", "--to hf writes a folder"),
    ("net.safetensors --to flax -o x", "has no config.json that tells its module: pass --module"),
    ("lm --to flax -o x --part model", "--part is for folders of Orbax, and lm is none"),
    ("lm --to flax -o x --names W_q", "--names means nothing with --to flax"),
    ("lm --to torch -o x.safetensors --names W_q", "names: expected one of"),
    ("flax --to flax -o x --module make.py:lm", "flax is Flax's already"),
    ("lm --to flax -o x --module make.py:number", "expected a module of Flax NNX, got a int"),
    ("lm --to flax -o x --module make.py:none", "has no function 'none'"),
    ("net.safetensors --to flax -o x --module make.py:plain", "pass rules; make.py:plain may"),
    ("net.safetensors --to hf -o x --module make.py:net", "module must be a CausalLM"),
    ("net.safetensors --to flax -o x --module make.py:lm", "the weights do not fit"),
    ("flax --to torch -o x.safetensors --module make.py:net", "the weights do not fit"),
    ("net.safetensors --to flax -o x --module make.py:normed", "would be lost: mean, var"),
    ("net.safetensors --to flax -o x --module make.py:paired", "pairs of a diff mean nothing"),
    ("net.safetensors --to torch -o x.safetensors --module make.py:net --names a", "gives rules"),
    ("lm --to torch -o x.safetensors --json x.safetensors", "--json x.safetensors would overwrite"),
    ("lm --to flax -o x --json lm/report.json", "would overwrite the checkpoint"),
    ("make.py --to flax -o x --module make.py:net", "make.py is no file of PyTorch's"),
    ("runs --to hf -o x --module make.py:lm", "those of Orbax in it are runs/1/state"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "make.py").write_text(FACTORIES)
    interop.save_pretrained(lm(), folder / "lm")
    save(folder / "flax", nnx.state(lm(), nnx.Param))
    save(folder / "runs" / "1" / "state", {"a": jnp.ones(2)})
    weights = {"out.weight": np.ones((2, 3), np.float32), "out.bias": np.ones(2, np.float32)}
    safetensors.numpy.save_file(weights, folder / "net.safetensors")
    return folder


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_exit_code_two_and_leaves_nothing(
    checkpoints, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(checkpoints)
    before = sorted(pathlib.Path().iterdir())
    assert main(["convert", *words.split()]) == 2
    assert message in capsys.readouterr().err
    left = [path for path in sorted(pathlib.Path().iterdir()) if path.name != "__pycache__"]
    assert left == [path for path in before if path.name != "__pycache__"]


SLOW = (pytest.param(name, marks=pytest.mark.slow) for name in ("_METADATA", "manifest.ocdbt"))


@pytest.mark.parametrize("file", ["d", *SLOW])
def test_a_broken_checkpoint_of_orbax(here, file):
    save(here / "flax", nnx.state(lm(), nnx.Param))
    path = here / "flax" / file
    for each in [path] if path.is_file() else [*path.iterdir()]:
        each.write_bytes(each.read_bytes()[: each.stat().st_size // 2])
    # In a process of its own: TensorStore leaves reads behind that complain later
    words = "convert flax --to hf -o x --module make.py:lm"
    code = "import sys; from jattn.parity.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "jattn: flax: Orbax does not read it: " in done.stderr
    assert not (here / "x").exists()


def test_help_shows_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "jattn convert net.pt --to flax --module my_net.py:make -o net_flax" in shown
