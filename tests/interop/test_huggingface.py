"""Folders of transformers: what they say is read, what they hold is loaded, and both come back."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jattn import attend, models, modifiers, ropes
from jattn.interop import ConversionError, FileError, load_pretrained, save_pretrained, to_torch
from jattn.interop.huggingface.config import read_config, read_rope, write_config
from jattn.models.causal_lm import PRESETS, Config

SIZES = {
    "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "eos_token_id": 5, "pad_token_id": None,
}  # fmt: skip
FACTORS = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
ROPES = {  # what config.json says of a rope, and which it is; θ = 5 unless it says another
    "default": ({"rope_type": "default"}, ropes.Rope(5.0)),
    "linear": ({"rope_type": "linear", "factor": 4.0}, ropes.Linear(5.0, 4.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, ropes.Dynamic(5.0, 4.0, 64)),
    "llama3": (
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        ropes.Llama3(5.0, 8.0, 1.0, 4.0, 16),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        ropes.Yarn(5.0, 4.0, 16),
    ),
    "longrope": (
        {"rope_type": "longrope", "original_max_position_embeddings": 16, **FACTORS},
        ropes.LongRope(5.0, *FACTORS.values(), 16, 4.0),  # the factor is 64 / 16
    ),
}  # fmt: skip
FAMILY = {  # architecture: further contents of config.json
    "llama": ("LlamaForCausalLM", {}),
    "llama with biases, tied": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4}),
    "mistral without a window": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2 with windows": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 10}),
    **{
        f"llama, {name}": ("LlamaForCausalLM", {"rope_parameters": {"rope_theta": 50.0} | said})
        for name, (said, _) in ROPES.items()
    },
}


def contents(**changes):
    return {"model_type": "llama", **SIZES, **changes}


def small(**options):
    config = Config(23, 12, 3, 4, 2, 8, 20, **options)
    return models.CausalLM(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ROPES)
def test_both_spellings_of_a_rope_are_read(name):
    said, expected = ROPES[name]
    new = contents(rope_parameters={**said, "rope_theta": 5.0})
    old = dict(said)
    old["type"] = old.pop("rope_type")
    assert read_rope(new) == expected
    assert read_rope(contents(rope_theta=5.0, rope_scaling=old)) == expected
    assert read_rope(contents(rope_theta=5, rope_scaling=None, rope_parameters=said)) == expected


def test_what_wins_where_a_rope_is_spelt_twice():
    """rope_scaling over rope_parameters, inside over beside, rope_type over type."""
    linear = {"rope_type": "linear", "type": "yarn", "factor": 3.0, "rope_theta": 7.0}
    other = {"rope_type": "default", "rope_theta": 9.0}
    both = contents(rope_theta=8.0, rope_scaling=linear, rope_parameters=other)
    assert read_rope(both) == ropes.Linear(7.0, 3.0)
    assert read_rope(contents()) == ropes.Rope(10000.0)


def test_yarn_of_other_models():
    """mscale counts with mscale_all_dim alone; without a factor it is the ratio of the lengths."""
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 16, "factor": 4.0}
    half = read_rope(contents(rope_scaling=yarn | {"mscale": 0.5}))
    assert half.scale == pytest.approx(0.1 * np.log(4) + 1)
    both = read_rope(contents(rope_scaling=yarn | {"mscale": 1.0, "mscale_all_dim": 0.5}))
    assert both.scale == pytest.approx((0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1))
    assert read_rope(contents(rope_scaling=yarn | {"attention_factor": 1.5})).scale == 1.5
    assert read_rope(contents(rope_scaling=yarn | {"factor": None})).factor == 64 / 16


def test_what_stands_for_a_missing_entry():
    bare = {"hidden_size": 64, "num_attention_heads": 4}
    llama = read_config({"model_type": "llama", **bare})
    assert (llama.num_kv_heads, llama.head_features, llama.tied) == (None, None, False)
    assert (llama.epsilon, llama.rope.base, llama.stop) == (1e-6, 10000.0, (2,))
    mistral = read_config({"model_type": "mistral", "num_attention_heads": 8, "hidden_size": 64})
    assert (mistral.num_kv_heads, mistral.window) == (8, 4096)
    qwen3 = read_config({"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 32})
    assert (qwen3.head_features, qwen3.normalize_qk, qwen3.window) == (128, True, None)
    assert read_config(contents(model_type="llama", sliding_window=4)).window is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"sliding_window": 4}, None),
        ({"sliding_window": 4, "use_sliding_window": True}, (None,) * 3),  # from layer 28 on
        ({"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, (None, 4, 4)),
        (
            {
                "sliding_window": 4,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (4, None, 4),
        ),
    ],
)
def test_which_layers_of_qwen_have_a_window(said, expected):
    assert read_config(contents(model_type="qwen2", **said)).window == expected


def test_generation_config_says_what_ends_a_text():
    assert read_config(contents()).stop == (5,)
    assert read_config(contents(eos_token_id=[5, 7])).stop == (5, 7)
    assert read_config(contents(), {"eos_token_id": [3, 4], "pad_token_id": 1}).stop == (3, 4)
    assert read_config(contents(), {}).stop == ()


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_comes_back(name):
    config = PRESETS[name]
    written = json.loads(json.dumps(write_config(config, dtype="bfloat16")))
    found = read_config(written)
    kv_heads, width = config.num_kv_heads or config.num_heads, config.features // config.num_heads
    assert found.num_kv_heads == kv_heads
    assert found.head_features == (config.head_features or width)
    for name in ("rope", "windows", "qkv_bias", "normalize_qk", "tied", "stop", "epsilon"):
        assert getattr(found, name) == getattr(config, name), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_model_comes_back_bit_for_bit(tmp_path, dtype, x64):
    model = models.CausalLM(Config(23, 12, 2, 4, 2, 8, 20), param_dtype=dtype, rngs=nnx.Rngs(3))
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    for name, tensor in to_torch(model).items():
        found = to_torch(loaded)[name]
        assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes(), name
    assert loaded.norm.scale.dtype == dtype
    narrow = load_pretrained(tmp_path / "model", param_dtype=jnp.bfloat16)
    assert narrow.norm.scale.dtype == jnp.bfloat16


def test_shards_and_a_table_that_is_tied(tmp_path):
    model = small(tied=True, stop=(3, 4))
    save_pretrained(model, tmp_path, max_shard_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    tensors = to_torch(model)
    assert index["metadata"] == {
        "total_size": sum(each.nbytes for each in tensors.values()),
        "total_parameters": sum(each.size for each in tensors.values()),
    }
    assert "lm_head.weight" not in index["weight_map"]
    loaded = load_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded(jnp.array([[3, 1]])), model(jnp.array([[3, 1]])))
    assert loaded.config.stop == (3, 4)


def rewritten(folder, **changes):
    """The folder with other tensors: None takes one away."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path) | changes
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if v is not None}, path)


@pytest.fixture
def folder(tmp_path):
    save_pretrained(small(), tmp_path)
    return tmp_path


def configured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_old_files_hold_buffers_that_are_not_learned(folder):
    rewritten(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    load_pretrained(folder)


def test_a_tied_output_may_be_written_too_but_not_differ(folder):
    table = np.arange(23 * 12, dtype=np.float32).reshape(23, 12)
    rewritten(folder, **{"model.embed_tokens.weight": table, "lm_head.weight": table})
    configured(folder, tie_word_embeddings=True)
    np.testing.assert_array_equal(load_pretrained(folder).embedding.embedding[...], table)
    rewritten(folder, **{"lm_head.weight": table + 1})
    with pytest.raises(ConversionError, match="the tied tensors differ"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "must be one of LlamaForCausalLM, .*got GPT2LM"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"model_type": "mistral"}, "contradicts itself: LlamaForCausalLM, but model_type 'mis"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        (
            {
                "architectures": None,
                "model_type": "qwen2",
                "use_sliding_window": False,
                "layer_types": ["sliding_attention"] * 3,
            },
            "holds sliding_attention, but use_sliding_window is false",
        ),
        (
            {"rope_scaling": {"type": "su", "factor": 2.0}},
            "rope_type must be one of default, .*'su",
        ),
        ({"rope_scaling": {"rope_type": "mrope"}}, "got 'mrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"quantization_config": {"bits": 4}}, "not quantized"),
        ({"layer_types": ["sliding_attention"] * 3}, "must be full_attention"),
        ({"num_key_value_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"hidden_size": 16}, r"contradict each other"),
        ({"num_hidden_layers": 2}, r"unused: model.layers.2"),
        ({"num_hidden_layers": 4}, r"missing: layers.3"),
        ({"attention_bias": True}, r"missing: layers.0.attention.key.bias"),
    ],
)
def test_a_config_that_is_not_known_or_contradicts_is_refused(folder, changes, match):
    configured(folder, **changes)
    with pytest.raises(ValueError, match=match):
        load_pretrained(folder)


def test_folders_that_are_not_whole_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_pretrained(tmp_path / "nowhere")
    rewritten(folder, **{"lm_head.weight": None})
    with pytest.raises(ConversionError, match=r"missing: out\.kernel"):
        load_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileError, match=r"pytorch_model\.bin is no file of PyTorch's"):
        load_pretrained(folder)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"names model-00001-of-00001\.safetensors, which"):
        load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_pretrained(folder)


def test_a_tokenizer_may_have_fewer_tokens_than_rows_but_not_more(folder):
    path = folder / "tokenizer.json"
    words = {"model": {"vocab": {f"w{n}": n for n in range(20)}}}
    path.write_text(json.dumps(words | {"added_tokens": [{"id": 22}]}))
    load_pretrained(folder)
    path.write_text(json.dumps(words | {"added_tokens": [{"id": 23}]}))
    with pytest.raises(ValueError, match=r"a token of id 23, but config.json vocab_size = 23"):
        load_pretrained(folder)


def test_what_is_saved_is_never_overwritten_and_always_expressible(folder, tmp_path):
    with pytest.raises(FileExistsError, match=r"holds a model already: config\.json, model"):
        save_pretrained(small(), folder)
    with pytest.raises(TypeError, match=r"must be a CausalLM, .*got Linear"):
        save_pretrained(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "new")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot express .*these can: Qwen3"):
        save_pretrained(small(normalize_qk=True), tmp_path / "new", architecture="LlamaForCausalLM")
    with pytest.raises(ValueError, match="no architecture of"):
        save_pretrained(small(window=(2, 3, None)), tmp_path / "new")
    with pytest.raises(ValueError, match=r"architecture must be one of .*got 'llama'"):
        save_pretrained(small(), tmp_path / "new", architecture="llama")
    with pytest.raises(ValueError, match="max_shard_bytes must be"):
        save_pretrained(small(), tmp_path / "new", max_shard_bytes=0)
    changed = small()
    changed.layers[1].window = 2
    with pytest.raises(ValueError, match="layer 1 has a window of its own"):
        save_pretrained(changed, tmp_path / "new")
    capped = functools.partial(attend, modifier=modifiers.soft_cap(1.0))
    with pytest.raises(ValueError, match="layer 0 has a modifier of its own"):
        model = models.CausalLM(Config(23, 12, 3, 4, 2, 8, 20), attend=capped, rngs=nnx.Rngs(0))
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_a_dtype_is_floating_point_and_there(folder, name):
    for wrong in ("bf16", jnp.int32):
        with pytest.raises(TypeError, match=f"{name} must be a floating dtype"):
            load_pretrained(folder, **{name: wrong})
    with pytest.raises(ValueError, match=f"{name} = float64 needs jax_enable_x64"):
        load_pretrained(folder, **{name: "float64"})


def test_files_that_cannot_be_read_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        load_pretrained(folder)
    path.unlink()
    for index, match in (({}, "has no weight_map"), ({"a": "../b"}, r"'\.\./b' is no name")):
        contents = {"weight_map": index} if index else {}
        (folder / "model.safetensors.index.json").write_text(json.dumps(contents))
        with pytest.raises(ValueError, match=match):
            load_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object, got list"):
        load_pretrained(folder)


@pytest.mark.torch
@pytest.mark.parametrize("name", FAMILY)
def test_transformers_and_jattn_load_what_the_other_saved(name, tmp_path):
    """Logits agree to float32's own error, and come back from jattn's folder bit for bit."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    architecture, further = FAMILY[name]
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    theirs = kind(kind.config_class(**SIZES | further)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    ours = load_pretrained(tmp_path / "theirs")
    tokens = np.random.default_rng(0).integers(0, 23, (2, 19))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(tokens), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    save_pretrained(ours, tmp_path / "ours", architecture=architecture, max_shard_bytes=4000)
    back, told = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        np.testing.assert_array_equal(back(torch.tensor(tokens)).logits.numpy(), expected)
    assert load_pretrained(tmp_path / "ours").config == ours.config
