"""Folders of `transformers`: a config, and weights in safetensors files."""

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
from jattn.interop.errors import ConversionError
from jattn.interop.huggingface.config import read_config, write_config
from jattn.interop.torch.convert import load_torch, to_torch
from jattn.models.causal_lm import CausalLM

Path = str | pathlib.Path
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 5 * 10**9
# Buffers of old files, which hold nothing that is learned
_IGNORED = ("rotary_emb.inv_freq",)


def load_pretrained(
    folder: Path,
    *,
    attend: Callable[..., Any] = attend,
    dtype: Any = None,
    param_dtype: Any = None,
) -> CausalLM:
    """The model of a folder that `transformers` has saved: of Llama, Mistral, Qwen2 or Qwen3.

    Weights are read from `model.safetensors`, or from the shards that its index names. Nothing is
    fetched: `huggingface_hub.snapshot_download` brings a folder here.

    Args:
      folder: with `config.json` and weights; `generation_config.json`, where there is one, says
        which tokens end a text.
      attend: as `CausalLM` takes it.
      dtype: to compute in; None: that of the parameters.
      param_dtype: the parameters are rounded to it; None: they keep the dtype of the files, where
        all have one, or the widest.

    Returns:
      A `CausalLM`.

    Raises:
      FileNotFoundError: the folder, or a file that it needs, is not there.
      TypeError: a dtype is not floating point.
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
        raise FileNotFoundError(f"{folder} is no folder; models are loaded from local folders")
    generation = folder / "generation_config.json"
    config = read_config(
        _json(folder / "config.json"), _json(generation) if generation.exists() else None
    )
    _check_tokenizer(folder / "tokenizer.json", config.vocabulary)
    tensors = {name: tensor for name, tensor in _tensors(folder) if not name.endswith(_IGNORED)}
    stored = jnp.result_type(*(tensor.dtype for tensor in tensors.values()))
    if param_dtype is not None:
        tensors = {name: tensor.astype(param_dtype) for name, tensor in tensors.items()}
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype or stored}

    def make() -> CausalLM:
        return CausalLM(config, attend=attend, rngs=nnx.Rngs(0), **options)

    model = nnx.eval_shape(make)
    try:
        load_torch(model, tensors)
    except ConversionError as error:
        hint = f"config.json of {folder} and its tensors contradict each other"
        raise ConversionError(**vars(error) | {"hint": hint}) from None
    return model


def save_pretrained(
    module: CausalLM,
    folder: Path,
    *,
    architecture: str | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Save a model so that `transformers` loads it: config.json, and weights in safetensors files.

    A tied table is written once. The tokenizer, which belongs to the folder too, is not part of a
    model: copy it.

    Args:
      module: a `CausalLM`.
      folder: is made; must hold no model yet.
      architecture: "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM" or
        "Qwen3ForCausalLM"; None: the first of these that has models of this config.
      max_shard_bytes: how much a file of weights holds, where there are several.

    Raises:
      TypeError: the module is no `CausalLM`.
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
    if not isinstance(module, CausalLM):
        raise TypeError(f"module must be a CausalLM, got {type(module).__name__}")
    checks.assert_positive(max_shard_bytes=max_shard_bytes)
    _check_plain(module)
    folder, tensors = pathlib.Path(folder), to_torch(module)
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    if len(dtypes) > 1:
        raise ValueError(f"the parameters must have one dtype, got {', '.join(sorted(dtypes))}")
    config = write_config(module.config, architecture, dtype=dtypes.pop())
    there = [name for name in ("config.json", _WEIGHTS, _INDEX) if (folder / name).exists()]
    if there:
        raise FileExistsError(f"{folder} holds a model already: {', '.join(there)}")
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(tensors, max_shard_bytes))
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
    generation = {name: config[name] for name in ("eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "config.json", config)


def _check_plain(module: CausalLM) -> None:
    """Nothing but the choice of a kernel may distinguish its attention from the config's."""
    for n, layer in enumerate(module.layers):
        attention: Any = layer.attention
        changed = set(getattr(attention.attend, "given", ["attend"])) - {"implementation"}
        if changed or layer.window != module.config.windows[n]:
            what = ", ".join(sorted(changed)) or "window"
            raise ValueError(f"layer {n} has a {what} of its own, which no config.json can say")


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


def _check_tokenizer(path: pathlib.Path, vocabulary: int) -> None:
    """More rows than tokens are usual; more tokens than rows would have no embedding."""
    if not path.exists():
        return
    tokenizer = _json(path)
    words = tokenizer.get("model", {}).get("vocab", {})
    ids = list(words.values()) if isinstance(words, dict) else list(range(len(words)))
    ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    if ids and max(ids) >= vocabulary:
        must = f"vocab_size = {vocabulary} rows of embeddings"
        raise ValueError(f"{path} has a token of id {max(ids)}, but config.json {must}")


def _json(path: pathlib.Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _write_json(path: pathlib.Path, contents: Any) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
