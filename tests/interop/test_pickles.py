"""Pickles are read by PyTorch's weights-only loader, or not at all."""

import json
import os
import pickle
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx

from jattn.interop import ConversionError, FileError, load_pretrained
from tests.interop.folders import FILE, lm, tensors, whole
from tests.interop.fuzz import flipped, inserted, swapped, truncated

PICKLE = "pytorch_model.bin"


@pytest.fixture
def folder(tmp_path):
    """Without weights."""
    folder = whole(tmp_path / "model")
    (folder / FILE).unlink()
    return folder


@pytest.mark.parametrize("contents", [b"PK\3\4rest", pickle.dumps({"weight": [1.0]})])
def test_without_torch_the_error_says_so(folder, monkeypatch, contents):
    (folder / PICKLE).write_bytes(contents)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(FileError, match=r"pytorch_model\.bin is a pickle, .* torch is not install"):
        load_pretrained(folder)
    old = types.ModuleType("torch")
    old.__version__ = "2.5.1+cpu"
    monkeypatch.setitem(sys.modules, "torch", old)
    with pytest.raises(
        FileError, match=r"pytorch_model\.bin .* needs torch 2\.6 or newer, or save"
    ):
        load_pretrained(folder)


@pytest.mark.parametrize("contents", [b"", b"{}", b"<html>", bytes(100)])
def test_what_is_no_pickle_is_not_given_to_torch(folder, monkeypatch, contents):
    (folder / PICKLE).write_bytes(contents)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(FileError, match=r"pytorch_model\.bin is no file of PyTorch's"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.pt", "training_args.bin"])
def test_pickles_of_other_names_are_not_guessed(folder, name):
    (folder / name).write_bytes(pickle.dumps({}))
    with pytest.raises(FileNotFoundError, match=f"it holds {name}: save them as model.safetensors"):
        load_pretrained(folder)


def test_a_pickle_that_leaves_the_folder_is_not_read(folder, tmp_path):
    (tmp_path / "outside").write_bytes(pickle.dumps({}))
    (folder / PICKLE).symlink_to(tmp_path / "outside")
    with pytest.raises(FileError, match=r"pytorch_model\.bin leads out of the folder"):
        load_pretrained(folder)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def state_dict(torch):
    return {name: torch.tensor(tensor) for name, tensor in tensors().items()}


def same(loaded):
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(loaded, nnx.Param)),
        nnx.to_pure_dict(nnx.state(lm(), nnx.Param)),
    )


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_loaded_bit_for_bit(folder, torch, zipped):
    torch.save(state_dict(torch), folder / PICKLE, _use_new_zipfile_serialization=zipped)
    same(load_pretrained(folder))


@pytest.mark.torch
def test_pickles_in_shards(folder, torch):
    where = {name: f"pytorch_model-{n % 2}.bin" for n, name in enumerate(tensors())}
    for file in set(where.values()):
        held = {name: each for name, each in state_dict(torch).items() if where[name] == file}
        torch.save(held, folder / file)
    (folder / f"{PICKLE}.index.json").write_text(json.dumps({"weight_map": where}))
    same(load_pretrained(folder))
    (folder / f"{PICKLE}.index.json").write_text(json.dumps({"weight_map": {"a": "../b.bin"}}))
    with pytest.raises(FileError, match="is no name of a file in the folder"):
        load_pretrained(folder)


@pytest.mark.torch
def test_safetensors_come_first(folder, torch):
    torch.save({}, folder / PICKLE)
    whole(folder.parent / "other")
    (folder.parent / "other" / FILE).rename(folder / FILE)
    same(load_pretrained(folder))


@pytest.mark.torch
def test_half_precision_and_numbers_that_are_not_finite(folder, torch):
    halves = {name: each.to(torch.bfloat16) for name, each in state_dict(torch).items()}
    halves["model.norm.weight"][0] = torch.inf
    torch.save(halves, folder / PICKLE)
    with pytest.warns(match=r"one tensor holds NaN or infinity: model\.norm\.weight"):
        assert load_pretrained(folder).norm.scale.dtype == "bfloat16"


class Program:
    """What a hostile file would do to whoever unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_no_program_is_run(folder, torch, tmp_path, zipped):
    held = state_dict(torch) | {"lm_head.weight": Program(tmp_path / "ran")}
    torch.save(held, folder / PICKLE, _use_new_zipfile_serialization=zipped)
    for contents in ((folder / PICKLE).read_bytes(), pickle.dumps(held["lm_head.weight"])):
        (folder / PICKLE).write_bytes(contents)
        with pytest.raises(FileError, match=r"bin: PyTorch's weights-only loader does not read it"):
            load_pretrained(folder)
        assert not (tmp_path / "ran").exists()


HELD = {
    "no tensors": (lambda torch: {}, "got a dict"),
    "a list": (lambda torch: [torch.ones(2)], "got a list"),
    "a tensor": (lambda torch: torch.ones(2), "got a Tensor"),
    "a checkpoint": (
        lambda torch: {"state_dict": {"a": torch.ones(2)}},
        "a dict with 'state_dict'",
    ),
    "numbers for names": (lambda torch: {1: torch.ones(2)}, "must hold a state dict"),
    "a few bytes, shown often": (
        lambda torch: {"a": torch.ones(1).expand(2**20, 2**20)},
        "bytes, but its tensors would have 4398046511104",
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", HELD)
def test_other_contents_are_named(folder, torch, name):
    contents, match = HELD[name]
    torch.save(contents(torch), folder / PICKLE)
    with pytest.raises(FileError, match=rf"pytorch_model\.bin .*{match}"):
        load_pretrained(folder)


@pytest.mark.torch
def test_sparse_tensors_are_named(folder, torch):
    torch.save({"a": torch.eye(3).to_sparse()}, folder / PICKLE)
    with pytest.raises(ConversionError, match=r"unfit: a: a sparse tensor"):
        load_pretrained(folder)


@pytest.mark.torch
def test_damaged_pickles(folder, torch, tmp_path):
    """A load succeeds or gives a documented error, whatever the bytes are."""
    torch.save(state_dict(torch), folder / PICKLE)
    torch.save(state_dict(torch), tmp_path / "old", _use_new_zipfile_serialization=False)
    sources = (folder / PICKLE).read_bytes(), (tmp_path / "old").read_bytes()
    for seed in range(200):
        draw = np.random.default_rng(seed)
        change = (flipped, truncated, inserted, swapped)[draw.integers(4)]
        (folder / PICKLE).write_bytes(change(draw, sources[seed % 2]))
        try:
            load_pretrained(folder)
        except (FileError, ConversionError):
            pass
        except UserWarning as warning:  # the suite makes errors of warnings
            assert "NaN or infinity" in str(warning)
