"""Where torch is installed: the references compute what transformers does."""

import importlib

import numpy as np
import pytest

pytestmark = pytest.mark.torch


def reference(name):
    return importlib.import_module(f"experiments.torch_reference.{name}")


def their_rope(rope):
    """A rope in the words of transformers."""
    words = {
        "base": "rope_theta",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "short_factors": "short_factor",
        "long_factors": "long_factor",
        "original_length": "original_max_position_embeddings",
    }
    rope = {"base": 10000.0} | rope
    kind = "default" if rope["kind"] == "Rope" else rope["kind"].lower()
    numbers = {words.get(name, name): rope[name] for name in rope.keys() - {"kind", "max_length"}}
    return {"rope_type": kind} | numbers


def their_model(name, config, **options):
    """A model of transformers in float64, with attention that is written out."""
    import transformers

    config = reference("causal_lm").PLAIN | config
    width = config["head_features"] or config["features"] // config["num_heads"]
    theirs = getattr(transformers, f"{name}Config")(
        vocab_size=config["vocabulary"],
        hidden_size=config["features"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"],
        num_key_value_heads=config["num_kv_heads"],
        head_dim=width,
        intermediate_size=config["mlp_features"],
        rms_norm_eps=config["epsilon"],
        tie_word_embeddings=config["tied"],
        rope_parameters=their_rope(config["rope"]),
        max_position_embeddings=config["rope"].get("max_length", 20480),  # Yarn's L₀ · factor
        attn_implementation="eager",
        **options,
    )
    return getattr(transformers, f"{name}ForCausalLM")(theirs).double().eval()


WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
MODELS = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 3}),
    "qwen2": ("Qwen2", WINDOWS),
    "qwen3": ("Qwen3", {}),
    "all_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "linear": ("Llama", {}),
    "dynamic": ("Llama", {}),
    "yarn": ("Llama", {}),
    "longrope": ("Llama", {}),
}


def difference(found, expected):
    """Root mean square."""
    return float((found.double() - expected).square().mean().sqrt())


@pytest.mark.parametrize("name", MODELS)
def test_the_language_model_is_theirs(name):
    """Up to float32: their norms, rotary tables and softmax run in it, also in a double model.

    So theirs may be as far from ours in float64 as twice what ours is in float32.
    """
    import torch

    torch.manual_seed(5)
    (case,) = (case for case in reference("causal_lm").cases() if case.name == name)
    family, options = MODELS[name]
    ours, theirs = (
        case.reference(**case.arguments).double(),
        their_model(family, case.arguments, **options),
    )
    state = {name: 0.5 * torch.randn_like(x) for name, x in ours.state_dict().items()}
    if case.arguments.get("tied"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for model in (ours, theirs):
        model.load_state_dict(state)
    tokens = torch.tensor(case.inputs["tokens"])
    with torch.no_grad():
        expected, found = ours.logits(tokens), theirs(tokens, use_cache=False).logits
        in_float32 = ours.float().logits(tokens)
    assert difference(found, expected) < 2 * difference(in_float32, expected)


@pytest.mark.parametrize("sizes", [(32, 128, True), (32, 128, False), (10, 17, True)])
def test_the_buckets_are_those_of_t5(sizes):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = torch.arange(-300, 301)
    names = "num_buckets", "max_distance", "bidirectional"
    theirs = T5Attention._relative_position_bucket(offsets, **dict(zip(names, sizes, strict=True)))
    bucket = reference("modifiers").t5_bucket
    assert theirs.tolist() == [bucket(offset, *sizes) for offset in offsets.tolist()]


@pytest.mark.parametrize("num_heads", [1, 4, 8, 12, 20, 71])
def test_the_slopes_of_alibi_are_those_of_bloom(num_heads):
    """Theirs are powers of a float32 base, so its rounding counts as often as the exponent says."""
    import torch
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float64)[:, 0, 1]
    ours = reference("modifiers").alibi_slopes(num_heads)
    np.testing.assert_allclose(ours, theirs, rtol=num_heads * np.finfo(np.float32).eps, atol=0)


def test_a_sink_is_that_of_gpt_oss():
    """In float64 throughout, rows that see one key or all of them."""
    import torch
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    torch.manual_seed(5)
    ours = reference("attention").SinkAttention(num_heads=3, offset=0).double()
    torch.nn.init.normal_(ours.sinks)
    ours.num_key_value_groups = 1
    heads = [torch.randn(2, 5, 3, 2, dtype=torch.float64) for _ in range(3)]
    hidden = torch.full((5, 5), float("-inf")).triu(1).double()
    output, weights = eager_attention_forward(
        ours, *(each.transpose(1, 2) for each in heads), hidden, scaling=2**-0.5
    )
    found = ours(*heads)
    torch.testing.assert_close(found["output"], output, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(found["weights"], weights, rtol=1e-14, atol=1e-15)
