import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jattn.parity.fixtures import Fixture, FixtureError, load, save


def example():
    generator = np.random.default_rng(0)
    weight, x, output = (
        generator.normal(size=(3, 5)),
        generator.normal(size=(2, 5)),
        generator.normal(size=(2, 3)),
    )
    return Fixture(
        system="multi_head/attention",
        case="example",
        arguments={"features": 5, "bias": False, "name": "größe"},
        seed=7,
        versions={"torch": "2"},
        float32_errors={"output/output": 1e-7},
        parameters={"fc.weight": weight, "scale": np.array(2.0)},
        inputs={"x": x, "lengths": np.array([5, 0]), "mask": np.array([[True, False]])},
        outputs={"output": output},
        modules={"fc[0]": output, "rnn[1][0]": output.T},
        cotangents={"output": output + 1},
        parameter_gradients={"fc.weight": weight + 1, "scale": np.array(0.5)},
        input_gradients={"x": x + 1},
    )


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "example.safetensors"
    save(path, example())
    loaded = load(path)
    assert loaded.title == "multi_head/example"
    for name in ("system", "case", "arguments", "seed", "versions", "float32_errors"):
        assert getattr(loaded, name) == getattr(example(), name)
    assert loaded.tensors.keys() == example().tensors.keys()
    for name, array in example().tensors.items():
        assert loaded.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.tensors[name], array)


def test_the_same_fixture_is_the_same_file(tmp_path):
    save(tmp_path / "a", example())
    save(tmp_path / "b", example())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such fixture: .*nowhere"):
        load(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_an_oversized_file_is_not_read(tmp_path):
    save(tmp_path / "a", example())
    with pytest.raises(FixtureError, match="at most max_bytes = 100 bytes, got"):
        load(tmp_path / "a", max_bytes=100)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("fixture") / "a"
    save(path, example())
    return path, path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file(whole, share):
    path, content = whole
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FixtureError, match="not an intact safetensors file"):
        load(path)


HEADERS = [
    b"",
    b"{",
    b"[]",
    b'{"a":1}',
    b'{"a":{"dtype":"F64","shape":[99999999999],"data_offsets":[0,8]}}',
    b"[" * 9999,
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_hostile_header(tmp_path, header):
    path = tmp_path / "hostile"
    for length in (len(header), 2**63, 2**64 - 1, 10**8):
        path.write_bytes(struct.pack("<Q", length) + header + bytes(8))
        with pytest.raises(FixtureError, match="hostile: not an intact safetensors file"):
            load(path)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2500), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bits_give_a_fixture_or_a_clear_error(whole, flips):
    path, content = whole
    spoiled = bytearray(content)
    for position, bits in flips:
        spoiled[position % len(spoiled)] ^= bits
    path.write_bytes(spoiled)
    try:
        load(path)
    except FixtureError as error:
        assert str(path) in str(error)


def write(path, arrays, facts):
    path.write_bytes(safetensors.numpy.save(arrays, facts))


FACTS = {
    "system": "pooling/average",
    "case": "a",
    "arguments": {},
    "seed": 0,
    "versions": {},
    "float32_errors": {},
}


@pytest.mark.parametrize(("facts", "message"), [
    ({}, "has no 'fixture'"),
    ({"fixture": "{"}, "no JSON"),
    ({"fixture": "[" * 100_000}, "no JSON"),
    ({"fixture": "[]"}, "expected metadata with system, case"),
    ({"fixture": json.dumps({"system": "a/b"})}, "expected metadata with system, case"),
    ({"fixture": json.dumps(FACTS | {"system": 1})}, "'system': expected str, got 1"),
    ({"fixture": json.dumps(FACTS | {"seed": True})}, "'seed': expected int, got True"),
    ({"fixture": json.dumps(FACTS | {"arguments": [1]})}, r"'arguments': expected dict, got \[1\]"),
    ({"fixture": json.dumps(FACTS | {"order": [1]})}, "'order': expected the names of all tensors"),
    ({"fixture": json.dumps(FACTS | {"order": "output"})}, "'order': expected the names of all"),
])  # fmt: skip
def test_a_safetensors_file_that_is_no_fixture(tmp_path, facts, message):
    write(tmp_path / "a", {"output/output": np.zeros(2)}, facts)
    with pytest.raises(FixtureError, match=message):
        load(tmp_path / "a")


@pytest.mark.parametrize(("arrays", "message"), [
    ({"weight": np.zeros(2)}, "'weight': expected a name in param/"),
    (
        {"param/w": np.zeros(2, np.float32)},
        "param/w: expected float64, integers or booleans, got float32",
    ),
    ({"grad/param/w": np.zeros(2)}, "expected one of parameters"),
    ({"grad/input/x": np.zeros(2), "input/x": np.zeros((2, 1))}, r"expected shape \(2, 1\)"),
    ({"cotangent/y": np.zeros(2), "output/y": np.zeros(3)}, r"expected shape \(3,\)"),
    (
        {"cotangent/y": np.zeros(2), "output/y": np.zeros(2), "param/w": np.zeros(3)},
        r"parameters \['w'\]",
    ),
])  # fmt: skip
def test_tensors_that_contradict_each_other(tmp_path, arrays, message):
    write(tmp_path / "a", arrays, {"fixture": json.dumps(FACTS)})
    with pytest.raises(FixtureError, match=message):
        load(tmp_path / "a")


def test_a_fixture_that_contradicts_itself_is_not_written(tmp_path):
    with pytest.raises(FixtureError, match="expected one of outputs"):
        save(tmp_path / "a", Fixture("pooling/average", "a", cotangents={"y": np.zeros(2)}))
    assert not (tmp_path / "a").exists()
