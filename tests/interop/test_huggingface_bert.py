"""Folders of BERT: today's and old ones, into any class, and back to transformers."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from jattn import attend, masks, models, nn
from jattn.interop import (
    ConversionError,
    FileError,
    load_pretrained,
    load_torch,
    save_pretrained,
    to_torch,
)
from jattn.interop.huggingface.bert_config import ARCHITECTURES, read_config, write_config
from jattn.models.bert import PRESETS, Config

C, D = 23, 8
SMALL = Config(C, D, 2, 2, 12, max_length=9)
TOKENS = np.array([[2, 5, 7, 3, 9, 3], [2, 11, 3, 22, 3, 0]])
TYPES = np.array([[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]])
LENGTHS = np.array([6, 5])
SIZES = {
    "vocab_size": C, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 9,
}  # fmt: skip
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
WORDS = "bert.embeddings.word_embeddings.weight"


def small(kind=models.BertForPreTraining, *, param_dtype=jnp.float32, attend=attend, **changes):
    """A model in which no parameter is a zero or a one."""
    config = Config(**{**vars(SMALL), **changes})
    model = kind(config, attend=attend, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(1)
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    drawn = [
        (path, leaf.replace(jnp.asarray(0.3 * draw.normal(size=leaf.shape), leaf.dtype)))
        for path, leaf in parameters
    ]
    nnx.update(model, nnx.from_flat_state(drawn))
    model.eval()
    return model


def written(folder, tensors, name="BertForPreTraining", **config):
    """A folder of tensors, and of a config.json."""
    folder.mkdir(exist_ok=True)
    whole = {key: np.ascontiguousarray(each) for key, each in tensors.items()}
    safetensors.numpy.save_file(whole, folder / "model.safetensors")
    contents = {"model_type": "bert", "architectures": [name], **SIZES, **config}
    (folder / "config.json").write_text(json.dumps(contents))
    return folder


def outputs(model, **options):
    found = model(TOKENS, types=TYPES, lengths=LENGTHS, deterministic=True, **options)
    return found if isinstance(found, tuple) else (found,)


def same(first, second):
    for one, other in zip(outputs(first), outputs(second), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def model():
    return small()


@pytest.fixture
def tensors(model):
    return to_torch(model)


@every_architecture
def test_a_model_comes_back_bit_for_bit(name, tmp_path):
    saved = small(ARCHITECTURES[name])
    save_pretrained(saved, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert type(loaded) is ARCHITECTURES[name] and loaded.config == saved.config
    expected, found = to_torch(saved), to_torch(loaded)
    assert list(expected) == list(found)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].tobytes() == tensor.tobytes(), key
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for key in file.keys():  # noqa: SIM118
            np.testing.assert_array_equal(file.get_tensor(key), expected[key])
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["architectures"] == [name] and said["model_type"] == "bert"


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("float16", "float64", "bfloat16")],
)
def test_files_keep_their_dtype(dtype, tmp_path, x64):
    saved = small(param_dtype=dtype)
    save_pretrained(saved, tmp_path)
    loaded = load_pretrained(tmp_path)
    for name, tensor in to_torch(saved).items():
        found = to_torch(loaded)[name]
        assert found.dtype == jnp.dtype(dtype) and found.tobytes() == tensor.tobytes(), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    narrow = load_pretrained(tmp_path, param_dtype=jnp.bfloat16)
    assert narrow.bert.norm.scale.dtype == jnp.bfloat16
    computes = load_pretrained(tmp_path, dtype=jnp.float32)
    assert computes.words.dtype == jnp.float32
    assert computes.bert.norm.scale.dtype == jnp.dtype(dtype)


def test_buffers_have_no_say_in_the_dtype(tensors, tmp_path):
    """position_ids, which old files hold, are integers."""
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    folder = written(tmp_path, half | {"bert.embeddings.position_ids": np.arange(9)[None]})
    assert load_pretrained(folder).bert.norm.scale.dtype == jnp.float16


def test_a_tied_table_is_written_once(model, tmp_path):
    save_pretrained(model, tmp_path, max_shard_bytes=1500)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert "cls.predictions.decoder.weight" not in index["weight_map"]
    assert "cls.predictions.decoder.bias" not in index["weight_map"]
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same(load_pretrained(tmp_path), model)


def test_old_spellings_are_read(model, tensors, tmp_path):
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert sum(name.endswith("gamma") for name in old) == 6
    old["bert.embeddings.position_ids"] = np.arange(9)[None]
    same(load_pretrained(written(tmp_path, old)), model)
    again = small()
    nnx.update(again, nnx.state(small(features=8, pad=None)))
    load_torch(again, old)
    same(again, model)
    both = old | {"bert.embeddings.LayerNorm.weight": tensors["bert.embeddings.LayerNorm.weight"]}
    with pytest.raises(ValueError, match=r"LayerNorm\.weight stands in the tensors in an old spel"):
        load_pretrained(written(tmp_path, both))


@pytest.mark.parametrize("bias", [True, False], ids=["with its bias", "without its bias"])
@pytest.mark.parametrize("weight", [True, False], ids=["with the decoder", "without the decoder"])
def test_a_tied_decoder_may_stand_there_too(weight, bias, model, tensors, tmp_path):
    more = dict(tensors)
    if weight:
        more["cls.predictions.decoder.weight"] = tensors[WORDS]
    if bias:
        more["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    same(load_pretrained(written(tmp_path, more)), model)
    if weight or not bias:
        again = small(param_dtype=jnp.float32)
        load_torch(again, more)
        same(again, model)


@pytest.mark.parametrize("name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_tied_tensors_that_differ_are_an_error(name, tensors, tmp_path):
    whole = {
        "cls.predictions.decoder.weight": tensors[WORDS],
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"],
    }
    whole[name] = whole[name] + 1
    with pytest.raises(ConversionError, match="the tied tensors differ"):
        load_pretrained(written(tmp_path, tensors | whole))


@pytest.mark.parametrize("bias", [True, False])
def test_a_decoder_of_its_own(bias, tmp_path):
    """Of two biases that differ transformers adds the decoder's."""
    saved = small(tied=False)
    tensors = to_torch(saved)
    if not bias:
        del tensors["cls.predictions.decoder.bias"]
    same(load_pretrained(written(tmp_path, tensors, tie_word_embeddings=False)), saved)
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    tensors["cls.predictions.bias"] = tensors["cls.predictions.bias"] + 1
    same(load_pretrained(written(tmp_path, tensors, tie_word_embeddings=False)), saved)
    del tensors["cls.predictions.decoder.weight"]
    with pytest.raises(ConversionError, match=r"missing: words\.out\.kernel"):
        load_pretrained(written(tmp_path, tensors, tie_word_embeddings=False))


def test_a_prefix_may_be_there_or_not(model, tensors, tmp_path):
    encoder = {name: each for name, each in tensors.items() if name.startswith("bert.")}
    bare = {name.removeprefix("bert."): each for name, each in encoder.items()}
    heads = {name: each for name, each in tensors.items() if name.startswith("cls.")}
    expected = model.bert(TOKENS, deterministic=True)
    for number, given in enumerate([encoder, bare, tensors, bare | heads]):
        folder = written(tmp_path / str(number), given, "BertModel")
        loaded = load_pretrained(folder)
        assert type(loaded) is models.Bert
        np.testing.assert_array_equal(loaded(TOKENS, deterministic=True), expected)
    same(load_pretrained(folder, models.BertForPreTraining), model)
    direct = models.Bert(SMALL, rngs=nnx.Rngs(5))
    for given in (encoder, bare):
        load_torch(direct, given)
        np.testing.assert_array_equal(direct(TOKENS, deterministic=True), expected)


@pytest.mark.parametrize("kind", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining"])
def test_any_folder_goes_into_any_class(name, kind, tmp_path):
    """The encoder is that of the folder; a head of the same name, too; others are new."""
    saved = small(ARCHITECTURES[name])
    save_pretrained(saved, tmp_path)
    loaded = load_pretrained(tmp_path, kind, rngs=nnx.Rngs(7))
    assert type(loaded) is kind
    before, after = to_torch(saved), to_torch(loaded)
    before = {key.removeprefix("bert."): each for key, each in before.items()}
    after = {key.removeprefix("bert."): each for key, each in after.items()}
    for key, tensor in after.items():
        if key in before:
            np.testing.assert_array_equal(tensor, before[key], err_msg=key)
        else:
            assert key.startswith(("cls.", "classifier.", "pooler."))
    assert all(np.isfinite(each).all() for each in outputs(loaded))


def test_a_head_that_is_not_there_needs_rngs(tensors, tmp_path):
    encoder = {
        name: each
        for name, each in tensors.items()
        if name.startswith("bert.") and "pooler" not in name
    }
    folder = written(tmp_path, encoder, "BertModel")
    hint = "holds no weights of this part: pass rngs, from which they are made"
    for kind, missing in {
        models.Bert: r"pooler\.kernel",
        models.BertForMaskedLM: r"words\.norm\.scale",
        models.BertForPreTraining: r"next\.kernel",
        models.BertForSequenceClassification: r"out\.kernel",
        models.BertForTokenClassification: r"out\.kernel",
    }.items():
        with pytest.raises(ConversionError, match=rf"(?s)missing: .*{missing}.*{hint}"):
            load_pretrained(folder, kind)
        first, again, other = (load_pretrained(folder, kind, rngs=nnx.Rngs(n)) for n in (0, 0, 1))
        same(first, again)
        if kind is not models.Bert:
            assert any((a != b).any() for a, b in zip(outputs(first), outputs(other), strict=True))
    bare = load_pretrained(folder, functools.partial(models.Bert, pooler=False))
    assert bare.pooler is None
    whole = load_pretrained(folder, functools.partial(models.Bert, pooler=True), rngs=nnx.Rngs(0))
    same(bare, whole)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", ["cls.predictions.bias", "cls.predictions.decoder.bias"])
@pytest.mark.parametrize("rngs", [None, nnx.Rngs(3)], ids=["all", "new heads"])
def test_one_of_the_two_biases_is_enough(tied, bias, rngs, tmp_path):
    model = small(tied=tied)
    tensors = to_torch(model)
    own = tensors.pop("cls.predictions.bias")
    tensors.pop("cls.predictions.decoder.bias", None)
    written(tmp_path, tensors | {bias: own}, tie_word_embeddings=tied)
    same(load_pretrained(tmp_path, rngs=rngs), model)


def test_a_tensor_with_and_without_its_prefix_is_refused(tensors, tmp_path):
    twice = {"embeddings.LayerNorm.bias": tensors["bert.embeddings.LayerNorm.bias"]}
    with pytest.raises(
        ValueError, match=r"embeddings\.LayerNorm\.bias stands .* 'bert\.' before it"
    ):
        load_pretrained(written(tmp_path, tensors | twice))


def test_heads_that_are_left_out_have_no_say_in_the_dtype(tensors, tmp_path):
    halves = {
        name: tensor if name.startswith("cls.") else tensor.astype(np.float16)
        for name, tensor in tensors.items()
    }
    encoder = load_pretrained(written(tmp_path, halves), models.Bert)
    assert encoder.norm.scale.dtype == jnp.float16


def test_names_of_classes_are_kept(tmp_path):
    kind = models.BertForSequenceClassification
    names = {"0": "bad", "1": "so", "2": "good"}
    tensors = to_torch(small(kind, classes=3))
    written(tmp_path / "theirs", tensors, "BertForSequenceClassification", id2label=names)
    loaded = load_pretrained(tmp_path / "theirs")
    assert loaded.config.labels == ("bad", "so", "good")
    save_pretrained(loaded, tmp_path / "ours")
    said = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert said["id2label"] == names and said["label2id"] == {"bad": 0, "so": 1, "good": 2}
    assert load_pretrained(tmp_path / "ours").config == loaded.config
    assert read_config({"num_labels": 5}).labels is None
    new = load_pretrained(tmp_path / "ours", models.BertForPreTraining, rngs=nnx.Rngs(0), classes=2)
    assert new.config.labels is None
    options = {"classes": 2, "labels": ("no", "yes")}
    new = load_pretrained(tmp_path / "ours", models.Bert, **options)
    assert new.config.labels == ("no", "yes")
    with pytest.raises(ValueError, match="labels must name 3 classes"):
        load_pretrained(tmp_path / "ours", labels=("bad", "good"))


def test_an_architecture_is_enough(model, tensors, tmp_path):
    same(load_pretrained(written(tmp_path, tensors, model_type=None)), model)


def test_a_change_that_contradicts_the_folder_is_named(tensors, tmp_path):
    with pytest.raises(ConversionError, match=r"with \{'max_length': 5\} and its tensors"):
        load_pretrained(written(tmp_path, tensors), max_length=5)


def test_a_pooler_that_is_not_there_need_not_be_made(tmp_path):
    written(tmp_path, to_torch(small(models.BertForMaskedLM)), "BertForMaskedLM")
    with pytest.raises(ConversionError, match=r"pass rngs, .*models\.Bert, pooler=False"):
        load_pretrained(tmp_path, models.Bert)


def test_a_file_of_integers_holds_no_weights(tmp_path):
    written(tmp_path, {"embeddings.position_ids": np.arange(3)})
    with pytest.raises(ValueError, match="holds no weights"):
        load_pretrained(tmp_path)


def test_a_function_of_ones_own_is_not_saved(tmp_path):
    def scaled(query, key, value, **options):
        return attend(2 * query, key, value, **options)

    with pytest.raises(ValueError, match="layer 0 has a attend of its own"):
        save_pretrained(small(attend=scaled), tmp_path / "new")


def test_an_encoder_that_is_not_whole_is_not_made_anew(tensors, tmp_path):
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    for rngs in (None, nnx.Rngs(0)):
        with pytest.raises(ConversionError, match=r"missing: bert\.layers\.1\.mlp\.linear2\.bias"):
            load_pretrained(written(tmp_path, tensors), rngs=rngs)
    with pytest.raises(ConversionError, match=r"unused: bert\.nonsense"):
        load_pretrained(
            written(tmp_path, to_torch(small()) | {"bert.nonsense": np.ones(3, np.float32)})
        )


def test_what_belongs_to_other_heads_is_left_out(model, tensors, tmp_path):
    head = np.ones((2, D), np.float32)
    more = {"qa_outputs.weight": head, "classifier.weight": head}
    same(load_pretrained(written(tmp_path, tensors | more)), model)


def test_the_config_may_be_changed(model, tensors, tmp_path):
    folder = written(tmp_path, tensors)
    kind = models.BertForSequenceClassification
    loaded = load_pretrained(folder, kind, classes=3, rngs=nnx.Rngs(0))
    assert loaded(TOKENS, deterministic=True).shape == (2, 3) and loaded.config.classes == 3
    assert load_pretrained(folder, dropout_rate=0.0).bert.dropout.rate == 0
    save_pretrained(loaded, tmp_path / "three")
    assert load_pretrained(tmp_path / "three").config.classes == 3
    with pytest.raises(ConversionError, match=r"unfit: classifier\.weight"):
        load_pretrained(tmp_path / "three", classes=4)
    with pytest.raises(TypeError, match="num_labels"):
        load_pretrained(folder, num_labels=3)
    with pytest.raises(ConversionError, match=r"(?s)unfit: .*contradict each other"):
        load_pretrained(folder, max_length=10)


def test_the_class_must_be_one_of_the_folder(tensors, tmp_path):
    folder = written(tmp_path, tensors)
    for wrong in (models.CausalLM, nnx.Linear, functools.partial(models.CausalLM), print):
        with pytest.raises(TypeError, match=r"can be loaded into Bert, BertForPreTraining, .*got"):
            load_pretrained(folder, wrong)
    llama = models.causal_lm.Config(C, features=8, num_layers=1, num_heads=2)
    save_pretrained(models.CausalLM(llama, rngs=nnx.Rngs(0)), tmp_path / "llama")
    with pytest.raises(TypeError, match=r"can be loaded into CausalLM, got .*Bert"):
        load_pretrained(tmp_path / "llama", models.Bert)


class Derived(models.BertForMaskedLM):
    pass


def test_a_class_that_is_derived_may_be_loaded_but_not_saved(tensors, tmp_path):
    loaded = load_pretrained(written(tmp_path, tensors), Derived)
    assert type(loaded) is Derived
    with pytest.raises(TypeError, match=r"module must be a CausalLM, Bert, .*got Derived"):
        save_pretrained(loaded, tmp_path / "new")


@pytest.mark.parametrize(
    "kind", [pytest.param("relative_key", marks=pytest.mark.slow), "relative_key_query"]
)
def test_relative_positions_ignore_the_absolute_table(kind, tmp_path):
    """Which is in the file, but is never added."""
    saved = small(positions=kind)
    tensors = to_torch(saved)
    assert "bert.encoder.layer.1.attention.self.distance_embedding.weight" in tensors
    absolute = "bert.embeddings.position_embeddings.weight"
    assert absolute not in tensors
    for more in ({}, {absolute: np.full((9, D), np.nan, np.float32)}):
        folder = written(tmp_path, tensors | more, position_embedding_type=kind)
        same(load_pretrained(folder), saved)
    save_pretrained(saved, tmp_path / "new")
    assert load_pretrained(tmp_path / "new").config == saved.config
    same(load_pretrained(tmp_path / "new"), saved)
    with pytest.raises(ConversionError, match="distance_embedding"):
        load_pretrained(written(tmp_path, tensors | more))
    other = to_torch(small())
    with pytest.raises(ConversionError, match=r"missing: .*attention\.attend\.embedding"):
        load_pretrained(written(tmp_path, other, position_embedding_type=kind))


def test_the_sentence_encoder_of_minilm_is_a_folder_of_bert(tmp_path):
    """Its file holds position_ids, int64, and a pooler; its config.json has no tie."""
    saved = small(models.Bert)
    tensors = to_torch(saved) | {"embeddings.position_ids": np.arange(9, dtype=np.int64)[None]}
    folder = written(tmp_path, tensors, "BertModel", torch_dtype="float32")
    same(load_pretrained(folder), saved)


def test_what_stands_for_a_missing_entry():
    config = read_config({"model_type": "bert"})
    assert config == PRESETS["bert-base-uncased"]
    assert (config.tied, config.epsilon, config.pad, config.classes) == (True, 1e-12, 0, 2)
    assert read_config({"pad_token_id": None}).pad is None
    assert read_config({"id2label": {"0": "A", "1": "B", "2": "C"}}).classes == 3
    assert read_config({"num_labels": 5}).classes == 5


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new", "gelu_pytorch_tanh"])
def test_a_config_comes_back(activation):
    config = read_config(
        {
            "hidden_act": activation, "classifier_dropout": 0.25, "hidden_dropout_prob": 0.5,
            "attention_probs_dropout_prob": 0.75, "type_vocab_size": 3, "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False, "pad_token_id": None, "num_labels": 4, **SIZES,
        }
    )  # fmt: skip
    assert (config.dropout_rate, config.attention_dropout_rate) == (0.5, 0.75)
    assert (config.num_types, config.epsilon, config.tied) == (3, 1e-5, False)
    said = json.loads(json.dumps(write_config(config, "BertModel", dtype="float32")))
    assert read_config(said) == config
    assert said["id2label"] == {str(n): f"LABEL_{n}" for n in range(4)}
    assert said["label2id"] == {f"LABEL_{n}": n for n in range(4)}


def test_functions_that_are_activations_have_names():
    for function, name in (
        (nn.transformer_layers.relu, "relu"),
        (nn.transformer_layers.gelu, "gelu"),
    ):
        config = Config(C, activation=function)
        assert write_config(config, "BertModel", dtype="float32")["hidden_act"] == name
    with pytest.raises(ValueError, match="activation must be one that transformers names"):
        write_config(Config(C, activation=jnp.tanh), "BertModel", dtype="float32")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"is_decoder": True}, "is_decoder: Bert is an encoder; a decoder is not known"),
        ({"add_cross_attention": True}, "add_cross_attention: Bert is an encoder"),
        ({"hidden_act": "swish"}, "hidden_act must be one of gelu, relu, .*got 'swish'"),
        ({"position_embedding_type": "rope"}, "positions must be one of .*got 'rope'"),
        (
            {"architectures": ["BertForQuestionAnswering"]},
            "architectures must be one of BertModel, .*got BertForQuestionAnswering: pass the "
            r"class to load it into, such as models\.Bert",
        ),
        ({"architectures": ["BertModel", "Other"]}, "got BertModel, Other"),
        ({"hidden_size": 9}, r"features \(9\) must be a multiple of num_heads \(2\)"),
        ({"hidden_size": 10}, "(?s)unfit: .*contradict each other"),
        ({"num_hidden_layers": 1}, r"unused: bert\.encoder\.layer\.1"),
        ({"num_hidden_layers": 3}, r"missing: bert\.layers\.2"),
        ({"type_vocab_size": 3}, r"unfit: bert\.embeddings\.token_type_embeddings\.weight"),
        ({"vocab_size": 24}, r"unfit: .*word_embeddings\.weight"),
        ({"tie_word_embeddings": False}, r"missing: words\.out\.kernel"),
    ],
)
def test_a_config_that_is_not_known_or_contradicts_is_refused(changes, match, tensors, tmp_path):
    with pytest.raises(ValueError, match=match):
        load_pretrained(written(tmp_path, tensors, **changes))


def test_an_unknown_architecture_goes_into_a_class_that_is_named(model, tensors, tmp_path):
    more = {"qa_outputs.weight": np.ones((2, D), np.float32)}
    folder = written(tmp_path, tensors | more, architectures=["BertForQuestionAnswering"])
    same(load_pretrained(folder, models.BertForPreTraining), model)
    assert type(load_pretrained(folder, models.Bert)) is models.Bert
    nameless = written(tmp_path, tensors, architectures=None)
    assert type(load_pretrained(nameless)) is models.Bert


def test_folders_without_weights_say_what_they_hold(tensors, tmp_path):
    folder = written(tmp_path, tensors)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileError, match=r"pytorch_model\.bin is no file of PyTorch's"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors and no .*json$"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_pretrained(folder)


def test_a_vocabulary_may_be_smaller_than_the_table_but_not_greater(tensors, tmp_path):
    folder = written(tmp_path, tensors)
    lines = folder / "vocab.txt"
    lines.write_text("\n".join(f"w{n}" for n in range(C)) + "\n")
    load_pretrained(folder)
    lines.write_text("\n".join(f"w{n}" for n in range(C + 1)) + "\n")
    with pytest.raises(
        ValueError, match=r"vocab\.txt has a token of id 23, but config\.json vocab"
    ):
        load_pretrained(folder)
    whole = folder / "tokenizer.json"  # which is read rather than the lines
    for n in (C, C + 1):
        words = {f"w{i}": i for i in range(n)}
        whole.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": words}}))
        if n == C:
            load_pretrained(folder)
    with pytest.raises(ValueError, match=r"tokenizer\.json has a token of id 23"):
        load_pretrained(folder)


def test_nothing_is_overwritten(model, tensors, tmp_path):
    folder = written(tmp_path, tensors)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match=r"holds a model already: config\.json, model"):
        save_pretrained(small(models.Bert), folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_a_config_cannot_say_is_not_saved(tmp_path):
    new = tmp_path / "new"
    causal = functools.partial(attend, mask=masks.causal())
    for positions in ("absolute", "relative_key"):
        with pytest.raises(ValueError, match="layer 0 has a mask of its own"):
            save_pretrained(small(attend=causal, positions=positions), new)
    sunk = small(models.Bert, attend=nn.AttentionSink(2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"the weights do not fit|of its own"):
        save_pretrained(sunk, new)
    with pytest.raises(ValueError, match="BertForPreTraining is BertForPreTraining, got 'BertMod"):
        save_pretrained(small(), new, architecture="BertModel")
    mixed = small()
    mixed.words.bias = nnx.Param(mixed.words.bias[...].astype(jnp.float16))
    with pytest.raises(ValueError, match="must have one dtype, got float16, float32"):
        save_pretrained(mixed, new)
    with pytest.raises(TypeError, match=r"must be a CausalLM, Bert, .*got Linear"):
        save_pretrained(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), new)
    assert not new.exists()
    save_pretrained(small(attend=functools.partial(attend, implementation="blockwise")), new)
    same(load_pretrained(new), small())


def test_dropout_begins_without_rngs(tensors, tmp_path):
    """At seed 0, so that two loads draw alike."""
    folder = written(tmp_path, tensors)
    loaded, again = load_pretrained(folder), load_pretrained(folder)
    loaded.train()
    first, second = (loaded(TOKENS)[0] for _ in range(2))
    assert np.isfinite(first).all() and np.isfinite(second).all() and (first != second).any()
    again.train()
    np.testing.assert_array_equal(again(TOKENS)[0], first)
    other = load_pretrained(folder, rngs=nnx.Rngs(3))
    other.train()
    assert (other(TOKENS)[0] != first).any()
    loaded.eval()
    np.testing.assert_array_equal(loaded(TOKENS)[0], loaded(TOKENS, deterministic=True)[0])


def test_parts_of_a_model_may_be_loaded_alone(model, tensors):
    """A layer, and the head of the words."""
    start = "bert.encoder.layer.1."
    layer = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    block = small().bert.layers[0]
    load_torch(block, layer)
    x = jnp.ones((2, D))
    expected = model.bert.layers[1](x, deterministic=True)
    np.testing.assert_array_equal(block(x, deterministic=True), expected)
    start = "cls.predictions."
    head = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
    words = models.bert.WordHead(SMALL, rngs=nnx.Rngs(9))
    load_torch(words, head)
    table = model.bert.embedding.embedding[...]
    np.testing.assert_array_equal(words(x, table), model.words(x, table))


def theirs_of(name, **options):
    """A model of transformers in float64 with drawn weights, none of them a zero or a one."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES | options)
    model = getattr(transformers, name)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model


def their_outputs(model):
    import torch

    real = np.arange(TOKENS.shape[1]) < LENGTHS[:, None]
    with torch.no_grad():
        found = model(
            *map(torch.tensor, (TOKENS, real.astype(int), TYPES)),
        )
    return [each.numpy() for each in found.to_tuple()]


OF_THEIRS = {  # the name, further contents of the config
    **{name: (name, {}) for name in ARCHITECTURES},
    "untied": ("BertForMaskedLM", {"tie_word_embeddings": False}),
    "three classes": ("BertForSequenceClassification", {"num_labels": 3}),
    "nine tags": ("BertForTokenClassification", {"num_labels": 9, "classifier_dropout": 0.3}),
    "one number": ("BertForSequenceClassification", {"num_labels": 1}),
    "relu, three types": ("BertModel", {"hidden_act": "relu", "type_vocab_size": 3}),
    "gelu by tanh": ("BertForPreTraining", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "gelu_pytorch_tanh": ("BertModel", {"hidden_act": "gelu_pytorch_tanh"}),
    "gelu_fast": ("BertModel", {"hidden_act": "gelu_fast"}),
    "no pad": ("BertModel", {"pad_token_id": None}),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", OF_THEIRS)
def test_transformers_and_jattn_load_what_the_other_saved(name, tmp_path, x64):
    """In float64 to 10⁻¹²; what jattn saves comes back in transformers bit for bit."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, options = OF_THEIRS[name]
    theirs = theirs_of(kind, **options)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="2KB")
    ours, expected = load_pretrained(tmp_path / "theirs"), their_outputs(theirs)
    assert type(ours) is ARCHITECTURES[kind]
    found = [*outputs(ours)]
    found += [ours.pool(found[0])] if kind == "BertModel" else []
    real = np.arange(TOKENS.shape[1]) < LENGTHS[:, None]
    for one, other in zip(found, expected, strict=True):
        if one.shape[:2] == real.shape:
            one, other = one[real], other[real]
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.abs(other).max())
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=2000)
    back, told = getattr(transformers, kind).from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float64
    )
    assert not any(told.values()), told
    state, again = theirs.state_dict(), back.state_dict()
    assert state.keys() == again.keys()
    unused = {"cls.predictions.bias"} if name == "untied" else set()  # that of the decoder counts
    assert all(state[key].equal(again[key]) for key in state.keys() - unused)
    same_tanh = {"gelu_pytorch_tanh", "gelu_fast"}  # which jattn writes as gelu_new
    tolerance = 1e-11 if name in same_tanh else 0
    for one, other in zip(their_outputs(back.eval()), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)
    for key, value in theirs.config.to_dict().items():
        if key in {"num_labels", "classifier_dropout", "pad_token_id", "type_vocab_size", *SIZES}:
            assert back.config.to_dict()[key] == value, key
    assert load_pretrained(tmp_path / "ours").config == ours.config


@pytest.mark.torch
@pytest.mark.parametrize("kind", ARCHITECTURES)
@every_architecture
def test_any_folder_of_transformers_goes_into_any_class(name, kind, tmp_path, x64):
    """With its encoder, and the heads that both have, as their own from_pretrained does."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, ARCHITECTURES[kind], rngs=nnx.Rngs(0))
    other = getattr(transformers, kind).from_pretrained(tmp_path, dtype=torch.float64).eval()
    encoder = getattr(other, "bert", other)
    expected = their_outputs(encoder)[0]
    found = outputs(getattr(ours, "bert", ours))[0]
    real = np.arange(TOKENS.shape[1]) < LENGTHS[:, None]
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-12)
    whole, state = to_torch(ours), theirs.state_dict()
    for key, tensor in other.state_dict().items():
        bare = key.removeprefix("bert.")
        held = next((state[each] for each in (key, bare, f"bert.{bare}") if each in state), None)
        if held is not None and key in whole:
            np.testing.assert_array_equal(whole[key], held.numpy(), err_msg=key)
            assert tensor.equal(held)


@pytest.mark.torch
def test_state_dicts_of_transformers_are_loaded_as_they_are(x64):
    """A state dict lists what is tied under each of its names."""
    for name, kind in ARCHITECTURES.items():
        theirs = theirs_of(name)
        ours = small(kind, param_dtype=jnp.float64)
        load_torch(ours, theirs.state_dict())
        found = np.asarray(outputs(ours)[0])
        expected = their_outputs(theirs)[0]
        real = (np.arange(TOKENS.shape[1]) < LENGTHS[:, None])[..., None]
        if found.shape[:2] == real.shape[:2]:
            found, expected = found * real, expected * real
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
