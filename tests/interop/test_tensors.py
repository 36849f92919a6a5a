"""What can be read as an array is read bit for bit; all else is named."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.interop import ConversionError, load_torch, to_torch
from jattn.interop.tensors import read


def linear():
    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def test_strides_of_any_sign():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    module = linear()
    load_torch(module, {"weight": weight[::-1, ::-1], "bias": np.ones(4, np.float32)[::-2]})
    np.testing.assert_array_equal(module.kernel[...], weight[::-1, ::-1].T)


@pytest.mark.parametrize("weights", [[1.0], {1: np.ones(2)}, "weight"])
def test_only_mappings_of_names(weights):
    with pytest.raises(TypeError, match=r"a mapping of names to tensors, such as module\.state"):
        read(weights)


def test_what_is_no_tensor_is_named():
    with pytest.raises(ConversionError, match=r"unfit: bias: expected a tensor.* got list"):
        load_torch(linear(), {"weight": np.ones((2, 3), np.float32), "bias": [1.0, 2.0]})


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision_travels_bit_for_bit(torch, dtype):
    reference = torch.nn.Linear(3, 2, dtype=getattr(torch, dtype))
    module = nnx.Linear(3, 2, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    load_torch(module, reference.state_dict())
    for name, array in to_torch(module).items():
        tensor = reference.state_dict()[name]
        back = torch.from_numpy(array.view("int16" if dtype == "bfloat16" else dtype))
        assert torch.equal(back.view(tensor.dtype), tensor)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_dtype_that_jax_lacks_is_named(torch):
    weights = {"weight": np.ones((2, 3), np.float32), "bias": torch.zeros(2, dtype=torch.complex32)}
    with pytest.raises(ConversionError, match=r"unfit: bias.* complex32"):
        load_torch(linear(), weights)


@pytest.mark.torch
def test_eight_bits_and_conjugates(torch):
    eight = torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn)
    conjugate = torch.tensor([1 + 2j]).conj()
    arrays = read({"eight": eight, "scalar": eight[0], "conjugate": conjugate})
    np.testing.assert_array_equal(arrays["eight"].astype(np.float32), [1.5, -2.0])
    assert arrays["scalar"].shape == ()
    np.testing.assert_array_equal(arrays["conjugate"], [1 - 2j])


@pytest.mark.torch
def test_parameters_that_need_gradients(torch):
    reference, module = torch.nn.Linear(3, 2), linear()
    load_torch(module, dict(reference.named_parameters()))
    np.testing.assert_array_equal(module.kernel[...], reference.weight.detach().numpy().T)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("storage", "message"), [
    (lambda tensor: tensor.to_sparse(), r"a sparse tensor \(torch.sparse_coo\)"),
    (lambda tensor: tensor.to_sparse_csr(), r"a sparse tensor \(torch.sparse_csr\)"),
    (lambda tensor: tensor.to("meta"), "a tensor on the meta device has no values"),
    (lambda tensor: quantized(tensor), r"a quantized tensor \(torch.qint8\)"),
], ids=["coo", "csr", "meta", "quantized"])  # fmt: skip
def test_other_storage_is_named(torch, storage, message):
    weights = torch.nn.Linear(3, 2).state_dict()
    weights["weight"] = storage(weights["weight"])
    with pytest.raises(ConversionError, match=f"unfit: weight: {message}"):
        load_torch(linear(), weights)


def quantized(tensor):
    import torch

    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.torch
def test_a_torch_module_is_no_mapping(torch):
    with pytest.raises(TypeError, match=r"module\.state_dict\(\), got Linear"):
        load_torch(linear(), torch.nn.Linear(3, 2))
