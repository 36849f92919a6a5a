"""What transformers generates for every prompt alone, jattn generates for all of them at once."""

import json

import numpy as np
import pytest

from jattn.interop import load_pretrained

pytestmark = pytest.mark.torch

SIZES = {
    "vocab_size": 41, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
FAMILY = {  # architecture: further contents of config.json
    "llama": ("LlamaForCausalLM", {}),
    "llama, yarn, tied": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_theta": 50.0, **YARN}, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2 with windows": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 10}),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8], [9, 7]]
LENGTHS = np.array([len(prompt) for prompt in PROMPTS])
L = 14


@pytest.fixture(scope="module", params=FAMILY.values(), ids=FAMILY)
def pair(request, tmp_path_factory):
    """A model of transformers, and ours from the folder that it saved; two ids end a text."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    architecture, further = request.param
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    theirs = kind(kind.config_class(**SIZES | further)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # far apart, so that rounding makes no choice
            parameter.copy_(0.5 * torch.randn_like(parameter))
    texts = [theirs_alone(theirs, prompt, {"eos_token_id": None}) for prompt in PROMPTS]
    theirs.generation_config.eos_token_id = [texts[0][4], texts[2][2]]
    folder = tmp_path_factory.mktemp("folder")
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder), folder


def theirs_alone(theirs, prompt, options):
    """Without any option that `generate` would set by itself."""
    import torch

    tokens = torch.tensor([prompt])
    found = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, do_sample=False,
        **{"max_new_tokens": L} | options,
    )  # fmt: skip
    return found[0, len(prompt) :].tolist()


def ours_together(ours, **options):
    tokens = np.zeros((len(PROMPTS), LENGTHS.max()), int)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    found = ours.generate(tokens, lengths=LENGTHS, **{"max_new_tokens": L} | options)
    texts = np.asarray(found.tokens).tolist()
    return [text[:length] for text, length in zip(texts, found.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_texts_are_those_of_transformers(pair, penalty):
    theirs, ours, _ = pair
    options = {"repetition_penalty": penalty}
    alone = [theirs_alone(theirs, prompt, options) for prompt in PROMPTS]
    assert ours_together(ours, **options) == alone


def test_the_generation_config_says_what_ends_a_text(pair):
    theirs, ours, folder = pair
    said = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert len(said) == 2 and ours.config.stop == tuple(said)
    texts = ours_together(ours)
    assert min(map(len, texts)) < L and texts[0][-1] in said
    unending = [theirs_alone(theirs, prompt, {"eos_token_id": -1}) for prompt in PROMPTS]
    assert ours_together(ours, stop=()) == unending
    assert len({token for text in unending for token in text}) > 9
    other = {"eos_token_id": unending[1][3]}
    alone = [theirs_alone(theirs, prompt, other) for prompt in PROMPTS]
    assert ours_together(ours, stop=unending[1][3]) == alone


@pytest.mark.parametrize("pair", [FAMILY["llama"]], indirect=True, ids=["llama"])
def test_a_length_that_is_not_given_is_20_new_tokens(pair):
    theirs, ours, _ = pair
    with pytest.warns(UserWarning, match="default `max_length`"):
        alone = theirs_alone(theirs, PROMPTS[0], {"eos_token_id": -1, "max_new_tokens": None})
    assert len(alone) == 20
    assert ours.generate(np.array([PROMPTS[0]]), stop=()).tokens[0].tolist() == alone
