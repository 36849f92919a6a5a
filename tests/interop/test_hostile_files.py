"""Broken and hostile weights: one error that names the file, and nothing is loaded."""

import json
import os
import pathlib
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jattn import models
from jattn.interop import ConversionError, FileError, load_pretrained, save_pretrained
from jattn.interop.tensor_files import safetensors_of
from jattn.models.causal_lm import Config
from tests.interop.folders import FILE, INDEX, sharded, tensors, weights, whole

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    return whole(tmp_path / "model")


@pytest.fixture
def shards(tmp_path):
    return sharded(tmp_path / "shards")


def raw(header, data=b"", length=None):
    """A file of this header, in JSON or as it is."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


NOT_WHOLE = "is no safetensors file, or not a whole one"
HEADERS = {
    "nothing": (b"", f"{NOT_WHOLE}: it has 0 bytes"),
    "half a length": (b"\1\0\0", f"{NOT_WHOLE}: it has 3 bytes"),
    "no header": (raw({}, length=10**4)[:8], f"{NOT_WHOLE}: it has 8 bytes, and a header of 10000"),
    "a header beyond the end": (raw({"a": entry()}, bytes(24), 10**6), "a header of 1000000 after"),
    "a header of 2⁶³ bytes": (raw({"a": entry()}, bytes(24), 2**63), "a header of 9223372036854"),
    "a huge header": (raw(b" " * 5 * 2**20), r"has a header of 5242880 bytes, more than 4194304"),
    "no bytes of the tensors": (raw({"a": entry()}), f"{NOT_WHOLE}: .*not fully covered"),
    "too few of them": (raw({"a": entry()}, bytes(20)), f"{NOT_WHOLE}: .*not fully covered"),
    "too many of them": (raw({"a": entry()}, bytes(30)), f"{NOT_WHOLE}: .*not fully covered"),
    "bytes beyond the end": (
        raw({"a": entry(shape=(20, 30), offsets=(0, 2400))}, bytes(24)),
        f"{NOT_WHOLE}: .*not fully covered",
    ),
    "overlapping tensors": (
        raw({"a": entry(), "b": entry(offsets=(12, 36))}, bytes(36)),
        f"{NOT_WHOLE}: .*invalid offset for tensor `b`",
    ),
    "a gap": (
        raw({"a": entry(), "b": entry(offsets=(28, 52))}, bytes(52)),
        f"{NOT_WHOLE}: .*invalid offset for tensor `b`",
    ),
    "an end before the beginning": (raw({"a": entry(offsets=(24, 0))}, bytes(24)), NOT_WHOLE),
    "a negative offset": (raw({"a": entry(offsets=(-24, 0))}, bytes(24)), f"{NOT_WHOLE}: .*-24"),
    "a negative axis": (raw({"a": entry(shape=(-2, -3))}, bytes(24)), f"{NOT_WHOLE}: .*`-2`"),
    "a huge shape": (raw({"a": entry(shape=(2**40, 2**40))}, bytes(24)), f"{NOT_WHOLE}: .*overfl"),
    "another shape": (raw({"a": entry(shape=(2, 2))}, bytes(24)), f"{NOT_WHOLE}: .*invalid shape"),
    "another dtype": (raw({"a": entry("F64")}, bytes(24)), f"{NOT_WHOLE}: .*invalid shape, data t"),
    "no dtype at all": (raw({"a": entry("F33")}, bytes(24)), f"{NOT_WHOLE}: .*variant `F33`"),
    "a fraction": (raw({"a": entry(shape=(2.5, 3))}, bytes(24)), f"{NOT_WHOLE}: .*2.5"),
    "a name twice": (
        raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(24)),
        r"the name 'a' stands in one object twice",
    ),
    "a list": (raw([]), f"{NOT_WHOLE}: .*invalid type: sequence"),
    "no JSON": (raw(b'{"a":'), f"{NOT_WHOLE}: .*EOF while parsing"),
    "no UTF-8": (raw('{"é":1}'.encode("latin1")), f"{NOT_WHOLE}: .*UTF-8"),
    "deep JSON": (raw(b'{"a":' + b"[" * 10**5), NOT_WHOLE),
    "quantized numbers": (raw({"a": entry("F8_E4M3", (24,))}, bytes(24)), "a must have .*F8_E4M3"),
    "a dtype NumPy lacks": (raw({"a": entry("F4", (48,))}, bytes(24)), "a must have a dtype.*F4"),
    "a pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "it is a pointer; `git lfs pull` fetches the file",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_broken_file_of_weights_is_named(folder, name):
    contents, match = HEADERS[name]
    (folder / FILE).write_bytes(contents)
    with pytest.raises(FileError, match=rf"model\.safetensors.*{match}"):
        load_pretrained(folder)


@pytest.mark.parametrize("length", [0, 7, 8, 9, 200, 1500, -1])
def test_a_file_cut_anywhere_is_no_file(folder, length):
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:length])
    with pytest.raises(FileError, match=NOT_WHOLE):
        load_pretrained(folder)


def test_a_file_cut_while_it_is_read(folder):
    held = safetensors_of(folder / FILE)
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-4])
    with pytest.raises(FileError, match=r"model\.safetensors ends within .*: it was cut while"):
        [tensor.load() for tensor in held.values()]


def test_every_dtype_of_numpy_is_read_bit_for_bit(tmp_path):
    draw = np.random.default_rng(0)
    dtypes = ["bool", "int8", "uint16", "int64", "float16", "bfloat16", "float64", "complex64"]
    said = {
        name: draw.integers(0, 2, (3, 5)).astype(jnp.bfloat16 if name == "bfloat16" else name)
        for name in dtypes
    } | {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(7, np.float32)}
    safetensors.numpy.save_file(said, tmp_path / FILE)
    for name, tensor in safetensors_of(tmp_path / FILE).items():
        found = tensor.load()
        assert (found.dtype, found.shape) == (said[name].dtype, said[name].shape)
        assert (tensor.dtype, tensor.shape) == (found.dtype, found.shape)
        assert found.tobytes() == said[name].tobytes()


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_weights_of_another_kind_do_not_fit(folder, dtype):
    weights(folder, **{"model.norm.weight": np.ones(4, dtype)})
    with pytest.raises(ConversionError, match=rf"unfit: model\.norm\.weight .*{dtype} does not"):
        load_pretrained(folder)
    safetensors.numpy.save_file({k: v.astype(dtype) for k, v in tensors().items()}, folder / FILE)
    with pytest.raises(FileError, match=r"model holds no weights of a floating dtype"):
        load_pretrained(folder)


def test_weights_wider_than_jax_has_them_are_refused_or_rounded(folder):
    weights(folder, **{"model.norm.weight": np.ones(4)})
    with pytest.raises(ValueError, match=r"of float64, for which jax_enable_x64.*or pass param_dt"):
        load_pretrained(folder)
    assert load_pretrained(folder, param_dtype=jnp.float32).norm.scale.dtype == jnp.float32


# Shards


def indexed(folder, change):
    path = folder / INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\\b", "C:x"]
)
def test_a_name_that_leaves_the_folder_is_not_followed(shards, name):
    indexed(shards, lambda where: where.update({"lm_head.weight": name}))
    with pytest.raises(FileError, match=r"index\.json: .* is no name of a file in the folder"):
        load_pretrained(shards)


def test_a_name_too_long_for_a_file(shards):
    indexed(shards, lambda where: where.update({"lm_head.weight": "a" * 5000}))
    with pytest.raises(FileError, match=r"index\.json: .*aaa cannot be opened"):
        load_pretrained(shards)


@pytest.mark.parametrize("name", [FILE, "config.json", "generation_config.json", "tokenizer.json"])
def test_a_link_that_leaves_the_folder_is_not_followed(folder, tmp_path, name):
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("{}")
    (folder / name).symlink_to(outside)
    with pytest.raises(FileError, match=rf"{name} leads out of the folder, to .*outside"):
        load_pretrained(folder)


def test_links_within_the_folder_and_to_the_cache_of_the_hub_are_followed(folder, shards, tmp_path):
    (folder / FILE).rename(folder / "weights")
    (folder / FILE).symlink_to("weights")
    load_pretrained(folder)
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "1f",
        tmp_path / "models--a--b/blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(shards.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(pathlib.Path("../../blobs", str(number)))
    load_pretrained(snapshot)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="leads out of the folder"):
        load_pretrained(snapshot)


@pytest.mark.parametrize("name", [FILE, "config.json", "tokenizer.json"])
def test_what_is_no_file_is_never_opened(folder, name):
    """A pipe would wait for ever, and links in a circle have no end."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(FileError, match=rf"{name} is no file"):
        load_pretrained(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(FileError, match=rf"{name} is no file"):
        load_pretrained(folder)
    (folder / name).rmdir()
    (folder / name).symlink_to(name)
    with pytest.raises(FileError, match=rf"{name} cannot be opened"):
        load_pretrained(folder)


def test_an_index_that_names_what_is_not_there(shards):
    first = "model-00001-of-00002.safetensors"
    indexed(shards, lambda where: where.update({"model.layers.7.mlp.up_proj.weight": first}))
    with pytest.raises(ConversionError, match=r"missing: .*layers\.7.* \(in model-00001") as caught:
        load_pretrained(shards)
    assert caught.value.hint.startswith("the shards do not hold all that ")
    indexed(shards, lambda where: where.pop("model.layers.7.mlp.up_proj.weight"))
    load_pretrained(shards)
    (shards / first).unlink()
    with pytest.raises(FileNotFoundError, match=rf"index\.json names {first}, which .*not hold"):
        load_pretrained(shards)


def test_an_index_that_leaves_out_a_tensor(shards):
    indexed(shards, lambda where: where.pop("lm_head.weight"))
    with pytest.raises(ConversionError, match=r"missing: out\.kernel"):
        load_pretrained(shards)


def test_a_tensor_in_two_shards_is_ambiguous(shards):
    first, second = sorted(shards.glob("*.safetensors"))
    both = safetensors.numpy.load_file(first)
    both["model.norm.weight"] = safetensors.numpy.load_file(second)["model.norm.weight"]
    safetensors.numpy.save_file(both, first)
    with pytest.raises(
        FileError, match=r"model\.norm\.weight lies in two files of .*: model-00001"
    ):
        load_pretrained(shards)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, "a", None])
def test_an_index_without_names_and_files(shards, index):
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(FileError, match=r"index\.json has no weight_map of names and files"):
        load_pretrained(shards)


# Numbers


def test_weights_that_are_not_finite_are_loaded_with_one_warning(folder):
    norm, table = np.ones(4, np.float32), tensors()["model.embed_tokens.weight"].copy()
    norm[1], table[0, 0] = np.nan, -np.inf
    weights(folder, **{"model.norm.weight": norm})
    with pytest.warns(match=r"model: one tensor holds NaN or infinity: model\.norm\.weight"):
        loaded = load_pretrained(folder)
    np.testing.assert_array_equal(loaded.norm.scale[...], norm)
    weights(folder, **{"model.norm.weight": norm, "model.embed_tokens.weight": table})
    with pytest.warns(match=r"2 tensors hold NaN or infinity: model\.embed_tokens") as caught:
        load_pretrained(folder)
    assert len(caught) == 1 and caught[0].filename == __file__
    weights(folder, **{"lm_head.weight": None, "model.norm.weight": norm})
    with pytest.raises(ConversionError):  # and no warning, for nothing is loaded
        load_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_are_watched_too(folder, dtype):
    narrow = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors().items()}
    narrow["model.norm.weight"][2] = np.inf
    safetensors.numpy.save_file(narrow, folder / FILE)
    with pytest.warns(match=r"one tensor holds NaN or infinity: model\.norm\.weight"):
        load_pretrained(folder)


def test_weights_that_become_infinite_when_they_are_rounded(folder):
    weights(folder, **{"model.norm.weight": np.full(4, 1e6, np.float32)})
    load_pretrained(folder, param_dtype=jnp.bfloat16)
    with pytest.warns(match=r"one tensor holds NaN or infinity: model\.norm\.weight"):
        load_pretrained(folder, param_dtype=jnp.float16)


def test_all_is_checked_before_a_tensor_is_read(folder, monkeypatch):
    """Names, shapes and dtypes that do not fit are found in headers alone."""

    def refuse(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("jattn.interop.tensor_files._read", refuse)
    with pytest.raises(AssertionError, match="a tensor was read"):
        load_pretrained(folder)
    for changes in ({"model.norm.weight": np.ones(5, np.float32)}, {"lm_head.weight": None}):
        weights(folder, **changes)
        with pytest.raises(ConversionError):
            load_pretrained(folder)


MEASURED = """
import sys
from flax import nnx
from jattn import interop, models
from jattn.models.causal_lm import Config

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

for folder in sys.argv[1:3]:
    before = peak()
    new = {"cls": models.BertForPreTraining, "rngs": nnx.Rngs(0)} if sys.argv[3:] else {}
    model = interop.load_pretrained(folder, **new)
    after = peak()
print(after - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, folder, tied):
    """At most twice the file, of which one is the model, and 64 MiB."""
    config = Config(60_000, 448, 1, 4, 4, mlp_features=256, tied=True)  # a table, and little else
    if not tied:
        config = Config(16_000, 512, 4, 8, 8, mlp_features=1536)
    save_pretrained(models.CausalLM(config, rngs=nnx.Rngs(0)), tmp_path / "large")
    assert_little_memory(folder, tmp_path / "large")


@pytest.mark.slow
def test_new_heads_of_bert_take_little_more_memory_than_the_model(tmp_path):
    for name, sizes in (("small", (100, 16, 1, 2)), ("large", (60_000, 512, 4, 8))):
        model = models.Bert(models.bert.Config(*sizes), rngs=nnx.Rngs(0))
        save_pretrained(model, tmp_path / name)
    assert_little_memory(tmp_path / "small", tmp_path / "large", "new heads")


def assert_little_memory(small, large, *words):
    size = (large / FILE).stat().st_size
    assert size > 100 * 2**20
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(small), str(large), *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert 0.5 * size < grown <= 2 * size + 64 * 2**20, f"{grown / size:.2f} files"
