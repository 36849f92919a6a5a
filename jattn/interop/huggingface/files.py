"""Folders of `transformers`: a config, and weights in safetensors files."""

import dataclasses
import functools
import json
import math
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from jattn.attention import attend
from jattn.functional import checks
from jattn.interop.convert import load_torch, part_to_torch, to_torch
from jattn.interop.errors import ConversionError, FileError
from jattn.interop.huggingface import bert as bert_names
from jattn.interop.huggingface import bert_config, fields
from jattn.interop.huggingface.config import ENDS, NAMED, architectures, read_config, write_config
from jattn.interop.huggingface.folder import (
    INDEX,
    WEIGHTS,
    check_tokenizer,
    json_of,
    naming,
    path_in,
    tensors_of,
)
from jattn.interop.tensors import Stored
from jattn.models import bert
from jattn.models.causal_lm import CausalLM
from jattn.nn.positions import RelativePositions

Path = str | pathlib.Path
_SHARD_BYTES = 5 * 10**9
_OF_HEADS = "words.", "next.", "out.", "pooler.", "bert.pooler."


def load_pretrained(
    folder: Path,
    cls: Callable[..., Any] | None = None,
    *,
    rngs: nnx.Rngs | None = None,
    attend: Callable[..., Any] = attend,
    dtype: Any = None,
    param_dtype: Any = None,
    **changes: Any,
) -> Any:
    """The model of a folder that `transformers` has saved: Llama, Mistral, Qwen2, Qwen3, or BERT.

    Weights are read from `model.safetensors`, or from the shards that its index names; where there
    is neither, from `pytorch_model.bin` by PyTorch's weights-only loader, if it is installed.
    Nothing is fetched: `huggingface_hub.snapshot_download` brings a folder here.

    The folder need not be trusted: nothing in it is run, no path of it is followed out of it, and
    all that it says is checked before the first tensor is read. Then one tensor after the other is
    read, so that less than twice the memory of the model is taken; a file of pickles is mapped,
    whose pages come on top, as far as the system has room for them. Weights that are NaN or
    infinite are loaded, with a warning.

    A folder of BERT may be loaded into any of its classes: what belongs to other heads is left out.
    Its dropout is on, as in every new module; `model.eval()` switches it off.

    Args:
      folder: with `config.json` and weights; `generation_config.json`, where there is one, says
        which tokens end a text.
      cls: what to make: `models.CausalLM`, `models.Bert`, one of the `models.BertFor…`, or a
        `functools.partial` of one; None: what `config.json` names.
      rngs: for dropout; and, where they are given, for a head or a pooler that the folder does not
        hold. None: all weights must be there, and dropout begins at seed 0. (For a head with other
        classes than that of the folder, make the model, and load `models.Bert` into its `bert`.)
      attend: as the class takes it.
      dtype: to compute in; None: that of the parameters.
      param_dtype: the parameters are rounded to it; None: they keep the dtype of the files, where
        all have one, or the widest.
      **changes: of the config, such as `classes=3` for a new head, or `dropout_rate=0.0`.

    Returns:
      A model of the class.

    Raises:
      FileNotFoundError: the folder, or a file that it needs, is not there.
      TypeError: a dtype is not floating point, the class is not one for this folder, or the config
        has no such name.
      FileError: (a ValueError) a file is broken, leads out of the folder, or contradicts another;
        the architecture or the type of the rope is not known; the tokenizer has more tokens than
        the model has rows; or there are pickles alone, and no PyTorch to read them.
      ConversionError: (a ValueError) tensors are missing, unused or of another shape than the
        config says, or a tied output differs from the embeddings.
      ValueError: float64 is asked for where JAX does not have it.

    Example:
      >>> import tempfile
      >>> from jattn import models
      >>> config = models.causal_lm.Config(11, features=8, num_layers=1, num_heads=2)
      >>> model = models.CausalLM(config, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_pretrained(model, folder)
      ...     loaded = load_pretrained(folder)
      >>> bool((loaded(jnp.array([[3, 1]])) == model(jnp.array([[3, 1]]))).all())
      True
    """
    _check_dtypes(dtype=dtype, param_dtype=param_dtype)
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; huggingface_hub.snapshot_download brings a model into one"
        )
    config, cls = _described(folder, cls)
    is_bert = isinstance(config, bert.Config)
    # The folder's names are of its own classes
    others = {"labels": None} if is_bert and "classes" in changes else {}
    config = dataclasses.replace(config, **others | changes)
    check_tokenizer(folder, config.vocabulary)
    faulty: dict[str, None] = {}
    tensors: dict[str, Any] = _watched(tensors_of(folder), param_dtype, faulty)
    if is_bert:
        with naming(folder):
            tensors = bert_names.selected(tensors, _class_of(cls))
    param_dtype = param_dtype or _widest(folder, tensors)
    _check_sizes(folder, config, tensors)
    make = functools.partial(cls, config, attend=attend, dtype=dtype, param_dtype=param_dtype)
    model = _without_weights(make, streams=rngs is None)
    _check_size(folder, model, tensors)
    if is_bert:
        tensors = _of_bert(model, tensors, {} if rngs is None else _new_heads(make, model, rngs))
    try:
        load_torch(model, tensors)
    except ConversionError as error:
        hint = _hint(folder, model, error, changes, new=rngs is not None)
        raise ConversionError(**vars(error) | {"hint": hint}) from None
    if faulty:
        many = f"{len(faulty)} tensors hold" if len(faulty) > 1 else "one tensor holds"
        warnings.warn(f"{folder}: {many} NaN or infinity: {next(iter(faulty))}", stacklevel=2)
    return model


def _described(folder: pathlib.Path, cls: Any) -> tuple[Any, Callable[..., Any]]:
    """The config of a folder, and the class to make of it."""
    given, generation = json_of(folder, "config.json"), None
    with naming(folder / "config.json"):
        fields.check(given, NAMED)
        is_bert, named = _is_bert(given, cls), architectures(given)
    if path := None if is_bert else path_in(folder, "generation_config.json"):
        generation = json_of(folder, path.name)
        with naming(path):
            fields.check(generation, ENDS)
    default: Any = CausalLM
    fitting: tuple[Any, ...] = (CausalLM,)
    with naming(folder / "config.json"):
        if not is_bert:
            config: Any = read_config(given, generation)
        else:
            config = bert_config.read_config(given)
            known, named = bert_config.ARCHITECTURES, named or ["BertModel"]
            if cls is None and (len(named) > 1 or named[0] not in known):
                raise ValueError(
                    f"architectures must be one of {', '.join(known)}, got {', '.join(named)}: "
                    "pass the class to load it into, such as models.Bert"
                )
            default, fitting = known.get(named[0]), tuple(known.values())
    made = _class_of(cls or default)
    if not (isinstance(made, type) and issubclass(made, fitting)):
        expected = ", ".join(each.__name__ for each in fitting)
        raise TypeError(f"{folder} can be loaded into {expected}, got {made!r}")
    return config, cls or made


def _check_sizes(folder: pathlib.Path, config: Any, held: Mapping[str, Stored]) -> None:
    """A model far larger than what is held would take time and memory before it failed."""
    D, held_weights = config.features, sum(math.prod(each.shape) for each in held.values())
    if config.num_layers > len(held):
        must = f"{folder / 'config.json'} says that there are {config.num_layers} layers"
        raise FileError(f"{must}, but the folder holds {len(held)} tensors")
    width = getattr(config, "head_features", None) or D // config.num_heads
    sizes = {
        "vocab_size": config.vocabulary, "intermediate_size": config.mlp_features,
        "num_attention_heads": config.num_heads * width,
    }  # fmt: skip
    if isinstance(config, bert.Config):
        sizes |= {
            "type_vocab_size": config.num_types, "num_labels": config.classes,
            "max_position_embeddings": config.max_length // config.num_heads,
        }  # fmt: skip
    for name, size in sizes.items():
        if size * D > held_weights:
            must = f"{folder / 'config.json'} says hidden_size = {D}, and by {name} a matrix of"
            raise FileError(f"{must} {size} × {D}, but the folder holds {held_weights} weights")


def _check_size(folder: pathlib.Path, model: Any, held: Mapping[str, Stored]) -> None:
    """The same of all layers together, before a weight is drawn."""
    weights = nnx.to_flat_state(nnx.state(model, nnx.Param))
    needed = sum(
        math.prod(variable.shape)
        for path, variable in weights
        if not ".".join(map(str, path)).startswith(_OF_HEADS)
    )
    available = sum(math.prod(each.shape) for each in held.values())
    if needed > 4 * available:
        must = f"{folder / 'config.json'} describes a model of {needed} weights"
        raise FileError(f"{must}, but the folder holds {available}")


def _watched(held: Mapping[str, Stored], dtype: Any, faulty: dict[str, None]) -> dict[str, Stored]:
    """The tensors, those of floats rounded to a dtype where one is given.

    Once read, those with NaN or infinity are added to the faulty ones.
    """
    tensors = dict(held)
    for name, tensor in held.items():
        if jnp.issubdtype(tensor.dtype, jnp.floating):
            rounded = tensor if dtype is None else tensor.astype(dtype)
            tensors[name] = rounded.watched(functools.partial(_note_faults, name, faulty))
    return tensors


def _widest(folder: pathlib.Path, tensors: Mapping[str, Stored]) -> Any:
    floats = {x.dtype for x in tensors.values() if jnp.issubdtype(x.dtype, jnp.floating)}
    if not floats:
        raise FileError(f"{folder} holds no weights of a floating dtype")
    wide = np.dtype("float64")
    if wide in floats and jax.dtypes.canonicalize_dtype(wide) != wide:
        must = "float64, for which jax_enable_x64 must be set"
        raise ValueError(f"{folder} holds weights of {must}; or pass param_dtype=jnp.float32")
    return jnp.result_type(*floats)


def _note_faults(name: str, faulty: dict[str, None], array: np.ndarray) -> None:
    flat = array.reshape(-1)
    for start in range(0, flat.size, 2**20):  # the flags of a whole tensor would take memory
        if not np.isfinite(flat[start : start + 2**20]).all():
            faulty[name] = None
            return


def _hint(
    folder: pathlib.Path, model: Any, error: ConversionError, changes: Any, *, new: bool
) -> str:
    """What may help where the tensors of a folder do not fit."""
    if changes:
        return f"config.json of {folder} with {changes} and its tensors contradict each other"
    if new or not _lacks_a_head(model, error):
        return f"config.json of {folder} and its tensors contradict each other"
    hint = f"{folder} holds no weights of this part: pass rngs, from which they are made"
    if isinstance(model, bert.Bert):
        hint += ", or make none: functools.partial(models.Bert, pooler=False)"
    return hint


def _is_bert(given: Mapping[str, Any], cls: Any) -> bool:
    if given.get("model_type") is not None:
        return bool(given["model_type"] == "bert")
    known = bert_config.ARCHITECTURES
    return any(name in known for name in architectures(given)) or _class_of(cls) in known.values()


def _class_of(cls: Any) -> Any:
    return cls.func if isinstance(cls, functools.partial) else cls


def _without_weights(make: Callable[..., nnx.Module], *, streams: bool) -> nnx.Module:
    """A module of shapes, whose streams of random numbers are there, or not."""

    def of_key(key: jax.Array) -> nnx.Module:
        return make(rngs=nnx.Rngs(key))

    def streams_of(key: jax.Array) -> nnx.State:
        return nnx.state(of_key(key), nnx.Not(nnx.Param))

    key = jax.random.key(0)
    model = nnx.eval_shape(of_key, key)
    if streams and nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.Param))):
        nnx.update(model, jax.jit(streams_of)(key))  # compiled, for then no weights are drawn
    return model


def _new_heads(make: Callable[..., Any], model: Any, rngs: nnx.Rngs) -> dict[str, np.ndarray]:
    """Weights of heads and pooler drawn from the rngs, of which the model's streams are, too."""

    def of_heads(path: Any, value: Any) -> bool:
        return isinstance(value, nnx.Param) and ".".join(map(str, path)).startswith(_OF_HEADS)

    @nnx.jit  # for then no weights of the encoder are drawn
    def drawn(rngs: nnx.Rngs) -> tuple[nnx.State, nnx.State]:
        new = make(rngs=rngs)
        return nnx.state(new, of_heads), nnx.state(new, nnx.Not(nnx.Param))

    heads, streams = drawn(rngs)
    nnx.update(model, streams)
    return part_to_torch(model, heads)


def _of_bert(
    model: Any, tensors: Mapping[str, Any], new: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Of the selected tensors those of a model, and `new` ones of heads that are not there."""
    inner, prefix = (model, "") if isinstance(model, bert.Bert) else (model.bert, "bert.")
    left_out: tuple[str, ...] = () if inner.pooler is not None else ("pooler.",)
    if inner.positions is None:
        left_out += ("embeddings.position_embeddings.",)  # in the file, but never added
    heads = bert_names.heads_of(type(model))
    found = {
        name if name.startswith(heads) else prefix + name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(left_out)
    }
    once, again = "cls.predictions.bias", "cls.predictions.decoder.bias"
    if again in found and (once not in found or not inner.config.tied):
        found[once] = found[again]  # of two that are not tied transformers adds the decoder's
    for part in (*heads, f"{prefix}pooler."):
        if not any(name.startswith(part) for name in found):
            found |= {name: tensor for name, tensor in new.items() if name.startswith(part)}
    return found


def _lacks_a_head(model: Any, error: ConversionError) -> bool:
    others = error.unused, error.ambiguous, error.unfit
    known = isinstance(model, tuple(bert_config.ARCHITECTURES.values()))
    return known and not any(others) and all(name.startswith(_OF_HEADS) for name in error.missing)


def save_pretrained(
    module: nnx.Module,
    folder: Path,
    *,
    architecture: str | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Save a model so that `transformers` loads it: config.json, and weights in safetensors files.

    A tied table is written once. The tokenizer, which belongs to the folder too, is not part of a
    model: copy it.

    Relative positions of BERT are read by `load_pretrained` and by versions 4 of `transformers`;
    version 5 no longer has them, reports their tables as unexpected, and draws absolute ones.

    Args:
      module: a `CausalLM`, a `Bert`, or one of the `BertFor…`.
      folder: is made; must hold no model yet.
      architecture: of a `CausalLM`: "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM" or
        "Qwen3ForCausalLM"; None: the first of these that has models of this config.
      max_shard_bytes: how much a file of weights holds, where there are several.

    Raises:
      TypeError: the module is none of these.
      ValueError: the architecture is not known; it has no models of this config, or none has; the
        parameters have several dtypes; or a layer has a window, a mask, a score or a modifier that
        its config does not say.
      FileExistsError: the folder holds a model.

    Example:
      >>> import tempfile
      >>> from jattn import models
      >>> config = models.causal_lm.Config(11, features=8, num_layers=1, num_heads=2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_pretrained(models.CausalLM(config, rngs=nnx.Rngs(0)), folder)
      ...     sorted(path.name for path in pathlib.Path(folder).iterdir())
      ['config.json', 'generation_config.json', 'model.safetensors']
    """
    checks.assert_positive(max_shard_bytes=max_shard_bytes)
    _check_plain(module)
    folder, tensors = pathlib.Path(folder), to_torch(module)
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    if len(dtypes) > 1:
        raise ValueError(f"the parameters must have one dtype, got {', '.join(sorted(dtypes))}")
    config = _described_by(module, architecture, dtype=dtypes.pop())
    there = [name for name in ("config.json", WEIGHTS, INDEX) if (folder / name).exists()]
    if there:
        raise FileExistsError(f"{folder} holds a model already: {', '.join(there)}")
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder, tensors, max_shard_bytes)
    if isinstance(module, CausalLM):
        generation = {name: config[name] for name in ("eos_token_id", "pad_token_id")}
        _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "config.json", config)


def _described_by(module: Any, architecture: str | None, *, dtype: str) -> dict[str, Any]:
    """The config.json of a module."""
    if isinstance(module, CausalLM):
        return write_config(module.config, architecture, dtype=dtype)
    own = {cls: name for name, cls in bert_config.ARCHITECTURES.items()}[type(module)]
    if architecture not in {None, own}:
        raise ValueError(
            f"architecture of a {type(module).__name__} is {own}, got {architecture!r}"
        )
    return bert_config.write_config(module.config, own, dtype=dtype)


def _check_plain(module: Any) -> None:
    """Nothing but the choice of a kernel may distinguish its attention from the config's."""
    known: tuple[type[nnx.Module], ...] = (CausalLM, *bert_config.ARCHITECTURES.values())
    if type(module) not in known:
        expected = ", ".join(cls.__name__ for cls in known)
        raise TypeError(f"module must be a {expected}, got {type(module).__name__}")
    for n, layer in enumerate(getattr(module, "bert", module).layers):
        attends: Any = layer.attention.attend
        attends = attends.attend if isinstance(attends, RelativePositions) else attends
        changed = set(getattr(attends, "given", ["attend"])) - {"implementation"}
        if getattr(attends, "function", None) is not attend:
            changed.add("attend")
        if isinstance(module, CausalLM) and layer.window != module.config.windows[n]:
            changed.add("window")
        if changed:
            what = ", ".join(sorted(changed))
            raise ValueError(f"layer {n} has a {what} of its own, which no config.json can say")


def _write_tensors(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], most: int) -> None:
    """One file of weights, or several and their index."""
    shards = list(_shards(tensors, most))
    names = [WEIGHTS]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
        total = {
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
            "total_parameters": sum(tensor.size for tensor in tensors.values()),
        }
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": where})
    for name, shard in zip(names, shards, strict=True):
        safetensors.numpy.save_file(shard, folder / name, metadata={"format": "pt"})


def _shards(tensors: Mapping[str, np.ndarray], most: int) -> Iterator[dict[str, np.ndarray]]:
    """The tensors, in their order, in parts of at most so many bytes, or of one tensor."""
    shard: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if shard and sum(each.nbytes for each in shard.values()) + tensor.nbytes > most:
            yield shard
            shard = {}
        # safetensors writes an array with other strides wrong, without a word
        shard[name] = np.ascontiguousarray(tensor)
    yield shard


def _check_dtypes(**given: Any) -> None:
    for name, dtype in given.items():
        if dtype is None:
            continue
        try:
            is_floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:
            is_floating = False
        if not is_floating:
            raise TypeError(f"{name} must be a floating dtype of JAX or NumPy, got {dtype!r}")
        if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
            raise ValueError(f"{name} = {jnp.dtype(dtype)} needs jax_enable_x64")


def _write_json(path: pathlib.Path, contents: Any) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
