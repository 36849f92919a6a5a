"""Broken and hostile JSON: one error that names the file and the field, before a model is made."""

import json

import pytest
from flax import nnx

from jattn import models
from jattn.interop import ConversionError, FileError, load_pretrained, save_pretrained
from jattn.models import bert
from tests.interop.folders import INDEX, configured, sharded, whole


@pytest.fixture
def folder(tmp_path):
    return whole(tmp_path / "model")


@pytest.fixture
def shards(tmp_path):
    return sharded(tmp_path / "shards")


@pytest.mark.parametrize("said", ["4", 4.0, True, 0, -4, 2**31, 10**400, None, [4], {}])
@pytest.mark.parametrize(
    "field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
def test_a_size_is_a_positive_integer(folder, field, said):
    configured(folder, **{field: said})
    with pytest.raises(FileError, match=rf"config\.json: {field} must be an integer from 1 to"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, got '1e-6'"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number, got 1000"),
        ({"rms_norm_eps": -1e-6}, "epsilon must be positive"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false.*'false'"),
        ({"attention_bias": 0}, "attention_bias must be true or false or null, got 0"),
        ({"hidden_act": ["silu"]}, "hidden_act must be a string"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures must be a string or a list"),
        ({"architectures": 7}, "architectures must be a string or a list"),
        ({"model_type": {}}, "model_type must be a string"),
        ({"layer_types": [1, 2]}, "layer_types must be a string or a list of strings"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number or null"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor must be a number above 0"),
        ({"rope_scaling": {"type": ["linear"]}}, "type must be a string"),
        (
            {
                "rope_scaling": {
                    "type": "yarn", "factor": 1e200, "mscale": 9.0, "mscale_all_dim": 9.0,
                }
            },
            "rope_type 'yarn' has numbers that are far too large",
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 3,
                }
            },
            "short_factor must have a number for each pair of 2 features, got 3",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": 1, "long_factor": [1.0]}},
            "short_factor must be a list of numbers",
        ),
        ({"sliding_window": 4.0}, "sliding_window must be an integer"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them"),
        ({"hidden_size": 2**30}, "says hidden_size = 1073741824, and by vocab_size a matrix of 11"),
        ({"vocab_size": 10**9}, "by vocab_size a matrix of 1000000000 × 4, but the folder holds"),
        ({"intermediate_size": 10**9}, "by intermediate_size a matrix of"),
        ({"head_dim": 10**9}, "by num_attention_heads a matrix of"),
        ({"num_hidden_layers": 10_000}, "says that there are 10000 layers, but .* holds 21 tens"),
        ({"num_hidden_layers": 20}, "describes a model of .* weights, but the folder holds"),
        ({"rope_theta": 1e999}, "rope_theta|Infinity is no number of JSON"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_named(folder, changes, match):
    configured(folder, **changes)
    with pytest.raises(
        FileError, match=rf"config\.json.*({match or 'eos_token_id must be a tok'})"
    ):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": 8}, r"unfit: model\.embed_tokens\.weight"),
        ({"num_hidden_layers": 1}, r"unused: model\.layers\.1"),
        ({"num_hidden_layers": 3}, r"missing: layers\.2"),
        ({"vocab_size": 10}, r"unfit: lm_head\.weight → .*\(11, 4\) gives \(4, 11\)"),
        ({"vocab_size": 12}, r"unfit: lm_head\.weight"),
        ({"intermediate_size": 6}, r"unfit: model\.layers\.0\.mlp\.down_proj"),
        ({"tie_word_embeddings": True}, r"unfit: .*the tied tensors differ"),
    ],
)
def test_a_config_that_contradicts_the_tensors(folder, changes, match):
    configured(folder, **changes)
    with pytest.raises(ConversionError, match=match) as caught:
        load_pretrained(folder)
    assert caught.value.hint == f"config.json of {folder} and its tensors contradict each other"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"eos_token_id": "3"}, "eos_token_id must be a token id"),
        ({"eos_token_id": [3, 4.0]}, "eos_token_id must be a token id or a list of them"),
        ({"pad_token_id": True}, "pad_token_id must be a token id"),
        ({"eos_token_id": 11}, r"eos_token_id .* of generation_config\.json must lie in 0 … 10"),
    ],
)
def test_a_token_that_ends_texts_is_one_of_the_vocabulary(folder, changes, match):
    (folder / "generation_config.json").write_text(json.dumps(changes))
    with pytest.raises(FileError, match=match):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": "4"}, "hidden_size must be an integer"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be an integer"),
        ({"type_vocab_size": True}, "type_vocab_size must be an integer"),
        ({"type_vocab_size": 10**9}, "by type_vocab_size a matrix of"),
        ({"max_position_embeddings": 10**9}, "by max_position_embeddings a matrix of"),
        ({"layer_norm_eps": None}, "layer_norm_eps must be a number"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob must be a number"),
        ({"hidden_dropout_prob": 2.0}, "dropout_rate must lie in 0 … 1"),
        ({"num_labels": 2**31 - 1, "id2label": None}, "by num_labels a matrix of"),
        ({"num_labels": 2.0}, "num_labels must be an integer"),
        ({"id2label": ["a"]}, "id2label must be an object"),
        ({"id2label": {"a": "b"}}, "id2label must hold the label of each number"),
        ({"id2label": {"0": ["b"]}}, "id2label must hold the label of each number"),
        ({"id2label": {"9" * 5000: "b"}}, "id2label|limit"),
        ({"position_embedding_type": ["absolute"]}, "position_embedding_type must be a string"),
        ({"is_decoder": "no"}, "is_decoder must be true or false"),
    ],
)
def test_a_field_of_bert_of_another_kind_is_named(tmp_path, changes, match):
    save_pretrained(
        models.Bert(bert.Config(11, 4, 2, 2, 5, max_length=7), rngs=nnx.Rngs(0)), tmp_path
    )
    configured(tmp_path, **changes)
    for options in ({}, {"rngs": nnx.Rngs(0), "cls": models.BertForSequenceClassification}):
        with pytest.raises(FileError, match=rf"config\.json.*{match}"):
            load_pretrained(tmp_path, **options)


def test_few_tensors_do_not_call_for_many_weights(tmp_path):
    """With rngs a model is drawn only if its size is near that of the folder."""
    config = bert.Config(4, 2, 1, 1, 3000, max_length=7, positions="relative_key")
    save_pretrained(models.Bert(config, pooler=False, rngs=nnx.Rngs(0)), tmp_path)
    configured(tmp_path, num_hidden_layers=15)
    with pytest.raises(FileError, match=r"describes a model of \d+ weights, but the folder holds"):
        load_pretrained(tmp_path, rngs=nnx.Rngs(0))


CONTENTS = {
    "a list": (b"[]", "must hold an object, got list"),
    "a number": (b"7", "must hold an object, got int"),
    "null": (b"null", "must hold an object, got NoneType"),
    "nothing": (b"", "is no JSON"),
    "half": (b'{"hidden_size": 4', "is no JSON"),
    "deep lists": (b"[" * 10**5 + b"]" * 10**5, "is no JSON that can be read: .* too deeply"),
    "deep objects": (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "is no JSON that can.*too deeply"),
    "no UTF-8": ('{"é": 1}'.encode("latin1"), "is no UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is no UTF-8"),
    "a name twice": (b'{"hidden_size": 4, "hidden_size": 8}', "the name 'hidden_size' stands in"),
    "NaN": (b'{"rms_norm_eps": NaN}', "NaN is no number of JSON"),
    "a long integer": (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is no JSON: Exceeds the limit"),
    "far too much": (b" " * (2**22 + 1), "has 4194305 bytes, more than 4194304"),
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_broken_json_is_named(folder, name, file):
    contents, match = CONTENTS[name]
    (folder / file).write_bytes(contents)
    with pytest.raises(FileError, match=rf"{file}.*{match}"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_broken_index_is_named(shards, name):
    contents, match = CONTENTS[name]
    must = "has no weight_map" if "object, got" in match or "far" in name else match
    (shards / INDEX).write_bytes(b"{}" if "far" in name else contents)
    with pytest.raises(FileError, match=rf"index\.json.*{must}"):
        load_pretrained(shards)


@pytest.mark.parametrize(
    "contents",
    [
        [], {}, {"model": []}, {"model": {"vocab": 7}}, {"model": {"vocab": {"a": "b"}}},
        {"model": {"vocab": {"a": -1}}}, {"model": {"vocab": {"a": 1.0}}},
        {"model": {"vocab": {"a": True}}}, {"model": {"vocab": {}}, "added_tokens": [7]},
        {"model": {"vocab": {}}, "added_tokens": [{"id": None}]}, {"model": {"vocab": None}},
    ],
)  # fmt: skip
def test_a_broken_tokenizer_is_named(folder, contents):
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(FileError, match=r"tokenizer\.json is no tokenizer that the library"):
        load_pretrained(folder)


def test_a_vocabulary_that_is_no_text(folder):
    (folder / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match=r"vocab\.txt is no UTF-8"):
        load_pretrained(folder)
