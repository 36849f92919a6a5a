"""Damaged folders: a load gives a whole model, or a documented error, and nothing else."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import models
from jattn.interop import ConversionError, FileError, load_pretrained, save_pretrained
from jattn.models import bert
from tests.interop.folders import sharded, whole
from tests.interop.fuzz import damage

DOCUMENTED = FileError, ConversionError, FileNotFoundError
BERT = bert.Config(11, 4, 2, 2, 5, max_length=7)


def bert_folder(folder):
    save_pretrained(models.BertForMaskedLM(BERT, rngs=nnx.Rngs(0)), folder)
    return folder


SOURCES = {"whole": whole, "sharded": sharded, "bert": bert_folder}


def check(folder):
    """Load, and hold what is loaded against a model of its own config."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = load_pretrained(folder)
        except DOCUMENTED as error:
            assert str(folder) in str(error) and len(str(error)) < 10_000
            return False
    own = nnx.eval_shape(lambda: type(model)(model.config, rngs=nnx.Rngs(0)))
    found, expected = (nnx.state(each, nnx.Param) for each in (model, own))
    shapes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(each)) for each in (found, expected)]
    assert shapes[0] == shapes[1]
    finite = all(np.isfinite(each).all() for each in jax.tree.leaves(found))
    warned = [str(each.message) for each in caught]
    assert len(warned) == (not finite) and all("NaN or infinity" in each for each in warned)
    return True


def run(source, tmp_path, seeds):
    SOURCES[source](tmp_path / "source")
    assert check(tmp_path / "source")
    loaded = 0
    for seed in seeds:
        damage(seed, tmp_path / "source", tmp_path / "damaged")
        try:
            loaded += check(tmp_path / "damaged")
        except BaseException as error:
            error.add_note(f"seed {seed} of {source}")
            raise
    assert 0 < loaded < len(seeds)


@pytest.mark.parametrize(("source", "number"), [("whole", 150), ("sharded", 100)])
def test_damaged_folders(source, number, tmp_path):
    run(source, tmp_path, range(number))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "number"), [("whole", 1000), ("sharded", 1000), ("bert", 300)])
def test_many_damaged_folders(source, number, tmp_path):
    run(source, tmp_path, range(10_000, 10_000 + number))


def test_the_damage_is_that_of_its_seed(tmp_path):
    whole(tmp_path / "source")
    for name in ("one", "two"):
        damage(3, tmp_path / "source", tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
