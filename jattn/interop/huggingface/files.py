"""Folders of `transformers`: a config, and weights in safetensors files."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from jattn.attention import attend
from jattn.functional import checks
from jattn.interop.convert import load_torch, to_torch
from jattn.interop.errors import ConversionError
from jattn.interop.huggingface import bert as bert_names
from jattn.interop.huggingface import bert_config
from jattn.interop.huggingface.config import architectures, read_config, write_config
from jattn.models import bert
from jattn.models.causal_lm import CausalLM
from jattn.nn.positions import RelativePositions

Path = str | pathlib.Path
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 5 * 10**9


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

    Weights are read from `model.safetensors`, or from the shards that its index names. Nothing is
    fetched: `huggingface_hub.snapshot_download` brings a folder here.

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
      ValueError: the architecture or the type of the rope is not known; the tokenizer has more
        tokens than the model has rows; a file cannot be read; or float64 is asked for where JAX
        does not have it.
      ConversionError: (a ValueError) tensors are missing, unused or of another shape than the
        config says, or a tied output differs from the embeddings.

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
    _check_tokenizer(folder, config.vocabulary)
    tensors = dict(_tensors(folder))
    if is_bert:
        tensors = bert_names.selected(tensors, _class_of(cls))
    floats = {name: x for name, x in tensors.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    if not floats:
        raise ValueError(f"{folder} holds no weights")
    stored = jnp.result_type(*(tensor.dtype for tensor in floats.values()))
    if param_dtype is not None:
        tensors |= {name: tensor.astype(param_dtype) for name, tensor in floats.items()}
    make = functools.partial(
        cls, config, attend=attend, dtype=dtype, param_dtype=param_dtype or stored
    )
    model = _without_weights(make) if rngs is None else make(rngs=rngs)
    if is_bert:
        tensors = _of_bert(model, tensors, new=rngs is not None)
    try:
        load_torch(model, tensors)
    except ConversionError as error:
        hint = f"config.json of {folder} and its tensors contradict each other"
        if changes:
            hint = f"config.json of {folder} with {changes} and its tensors contradict each other"
        elif rngs is None and is_bert and _lacks_a_head(error):
            hint = f"{folder} holds no weights of this part: pass rngs, from which they are made"
            if isinstance(model, bert.Bert):
                hint += ", or make none: functools.partial(models.Bert, pooler=False)"
        raise ConversionError(**vars(error) | {"hint": hint}) from None
    return model


def _described(folder: pathlib.Path, cls: Any) -> tuple[Any, Callable[..., Any]]:
    """The config of a folder, and the class to make of it."""
    given, generation = _json(folder / "config.json"), folder / "generation_config.json"
    if isinstance(given, dict) and _is_bert(given, cls):
        config: Any = bert_config.read_config(given)
        known, named = bert_config.ARCHITECTURES, architectures(given) or ["BertModel"]
        if cls is None and (len(named) > 1 or named[0] not in known):
            raise ValueError(
                f"architectures must be one of {', '.join(known)}, got {', '.join(named)}: pass "
                "the class to load it into, such as models.Bert"
            )
        default, fitting = known.get(named[0]), tuple(known.values())
    else:
        config = read_config(given, _json(generation) if generation.exists() else None)
        default, fitting = CausalLM, (CausalLM,)
    made = _class_of(cls or default)
    if not (isinstance(made, type) and issubclass(made, fitting)):
        expected = ", ".join(each.__name__ for each in fitting)
        raise TypeError(f"{folder} can be loaded into {expected}, got {made!r}")
    return config, cls or made


def _is_bert(given: Mapping[str, Any], cls: Any) -> bool:
    if given.get("model_type") is not None:
        return bool(given["model_type"] == "bert")
    known = bert_config.ARCHITECTURES
    return any(name in known for name in architectures(given)) or _class_of(cls) in known.values()


def _class_of(cls: Any) -> Any:
    return cls.func if isinstance(cls, functools.partial) else cls


def _without_weights(make: Callable[..., nnx.Module]) -> nnx.Module:
    """A module of shapes, whose streams of random numbers are there."""

    def of_key(key: jax.Array) -> nnx.Module:
        return make(rngs=nnx.Rngs(key))

    def streams(key: jax.Array) -> nnx.State:
        return nnx.state(of_key(key), nnx.Not(nnx.Param))

    key = jax.random.key(0)
    model = nnx.eval_shape(of_key, key)
    nnx.update(model, jax.jit(streams)(key))  # compiled, for then no weights are drawn
    return model


def _of_bert(model: Any, tensors: Mapping[str, np.ndarray], *, new: bool) -> dict[str, np.ndarray]:
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
    own = to_torch(model) if new else {}
    for part in (*heads, f"{prefix}pooler."):
        if not any(name.startswith(part) for name in found):
            found |= {name: tensor for name, tensor in own.items() if name.startswith(part)}
    return found


def _lacks_a_head(error: ConversionError) -> bool:
    of_heads = "words.", "next.", "out.", "pooler.", "bert.pooler."
    others = error.unused, error.ambiguous, error.unfit
    return not any(others) and all(name.startswith(of_heads) for name in error.missing)


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
    there = [name for name in ("config.json", _WEIGHTS, _INDEX) if (folder / name).exists()]
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
    names = [_WEIGHTS]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
        total = {
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
            "total_parameters": sum(tensor.size for tensor in tensors.values()),
        }
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(folder / _INDEX, {"metadata": total, "weight_map": where})
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


def _tensors(folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of a folder by its name, from the files that the index names."""
    if (folder / _WEIGHTS).exists():  # as transformers, even where there is an index, too
        yield from _read(folder / _WEIGHTS, None)
        return
    if not (folder / _INDEX).exists():
        others = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; it holds {', '.join(others)}: save them as safetensors" if others else ""
        raise FileNotFoundError(f"{folder} holds no {_WEIGHTS} and no {_INDEX}{hint}")
    files: dict[str, list[str]] = {}
    index = _json(folder / _INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{folder / _INDEX} has no weight_map")
    for name, file in index["weight_map"].items():
        if pathlib.Path(file).name != file:
            raise ValueError(f"{_INDEX} names {file}, which is not in the folder")
        files.setdefault(file, []).append(name)
    for file, names in files.items():
        if not (folder / file).exists():
            raise FileNotFoundError(f"{_INDEX} names {file}, which {folder} does not hold")
        yield from _read(folder / file, names)


def _read(path: pathlib.Path, names: list[str] | None) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, all or those of the names."""
    try:
        opened = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    with opened as file:
        held = list(file.keys())
        absent = sorted(set(names or ()) - set(held))
        if absent:
            raise ConversionError(
                missing=absent, hint=f"{path} does not hold all that the index says"
            )
        halves = {name for name in held if file.get_slice(name).get_dtype() == "BF16"}
        for name in names or held:
            if name not in halves:
                yield name, file.get_tensor(name)
    if halves:  # which NumPy knows by ml_dtypes alone
        with safetensors.safe_open(path, framework="flax") as file:
            for name in names or held:
                if name in halves:
                    yield name, np.asarray(file.get_tensor(name))


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


def _check_tokenizer(folder: pathlib.Path, vocabulary: int) -> None:
    """More rows than tokens are usual; more tokens than rows would have no embedding."""
    path, lines = folder / "tokenizer.json", folder / "vocab.txt"
    if path.exists():
        ids = _token_ids(path)
    elif lines.exists():
        path, ids = lines, list(range(len(_text(lines).removesuffix("\n").split("\n"))))
    else:
        return
    if ids and max(ids) >= vocabulary:
        must = f"vocab_size = {vocabulary} rows of embeddings"
        raise ValueError(f"{path} has a token of id {max(ids)}, but config.json {must}")


def _token_ids(path: pathlib.Path) -> list[int]:
    """The ids of a tokenizer.json."""
    tokenizer = _json(path)
    try:
        words = tokenizer["model"]["vocab"]
        ids = list(words.values()) if isinstance(words, dict) else list(range(len(words)))
        return ids + [token["id"] for token in tokenizer.get("added_tokens", [])]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no tokenizer that the library tokenizers writes") from None


def _json(path: pathlib.Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {error}") from None


def _write_json(path: pathlib.Path, contents: Any) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
