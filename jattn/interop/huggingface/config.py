"""config.json of the Llama family to and from the config of a `CausalLM`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jattn.functional import ropes
from jattn.interop.huggingface import fields
from jattn.interop.huggingface.fields import NULL
from jattn.models.causal_lm import Config

Json = Mapping[str, Any]

_COMMON: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN: dict[str, Any] = _COMMON | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28,
}  # fmt: skip
_FIRST: dict[str, Any] = _COMMON | {"vocab_size": 32000, "eos_token_id": 2}
ARCHITECTURES: Mapping[str, Json] = MappingProxyType(
    {
        "LlamaForCausalLM": _FIRST
        | {"model_type": "llama", "intermediate_size": 11008, "max_position_embeddings": 2048},
        "MistralForCausalLM": _FIRST
        | {
            "model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "sliding_window": 4096,
        },
        "Qwen2ForCausalLM": _QWEN | {"model_type": "qwen2"},
        "Qwen3ForCausalLM": _QWEN | {"model_type": "qwen3", "head_dim": 128},
    }
)  # fmt: skip
"""Architecture → what `transformers` takes where config.json is silent."""

NAMED: Mapping[str, str] = MappingProxyType(
    {
        "model_type": fields.WORD + NULL, "architectures": fields.WORDS + NULL,
        "hidden_act": fields.WORD,
    }
)  # fmt: skip
ENDS: Mapping[str, str] = MappingProxyType(
    {"eos_token_id": fields.TOKENS + NULL, "pad_token_id": fields.TOKEN + NULL}
)
_KINDS: Mapping[str, str] = MappingProxyType(
    {
        **NAMED, **ENDS,
        **dict.fromkeys(
            ["vocab_size", "hidden_size", "num_attention_heads", "intermediate_size",
             "max_position_embeddings"],
            fields.SIZE,
        ),
        "num_hidden_layers": fields.LAYERS,
        **dict.fromkeys(
            ["num_key_value_heads", "head_dim", "sliding_window",
             "original_max_position_embeddings"],
            fields.SIZE + NULL,
        ),
        "max_window_layers": fields.INDEX,
        "rms_norm_eps": fields.NUMBER,
        **dict.fromkeys(["rope_theta", "partial_rotary_factor"], fields.NUMBER + NULL),
        **dict.fromkeys(
            ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"],
            fields.FLAG + NULL,
        ),
        **dict.fromkeys(["rope_scaling", "rope_parameters"], fields.OBJECT + NULL),
        "layer_types": fields.WORDS + NULL,
    }
)  # fmt: skip
_ROPE_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "rope_type": fields.WORD, "type": fields.WORD,
        "original_max_position_embeddings": fields.SIZE + NULL,
        **dict.fromkeys(["short_factor", "long_factor"], fields.NUMBERS + NULL),
        **dict.fromkeys(
            ["rope_theta", "partial_rotary_factor", "factor", "attention_factor", "mscale",
             "mscale_all_dim", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"],
            fields.NUMBER + NULL,
        ),
        "truncate": fields.FLAG + NULL,
    }
)  # fmt: skip


def read_config(config: Json, generation: Json | None = None) -> Config:
    """The config of the `CausalLM` that a config.json describes.

    Old and new spellings are read: `rope_theta` with `rope_scaling`, or `rope_parameters`. What
    acts in training alone, such as `attention_dropout`, is no part of the model.

    Args:
      config: the contents of config.json.
      generation: those of generation_config.json, whose stop tokens win; None: there is none.

    Raises:
      ValueError: a field is of another kind; the architecture, the activation or the type of the
        rope is not known; the config asks for what `CausalLM` has not; or it contradicts itself.

    Example:
      >>> read_config({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}).features
      64
    """
    fields.check(config, _KINDS)
    architecture = architecture_of(config)
    given = {**ARCHITECTURES[architecture], **config}
    _check_supported(given)
    qwen2 = architecture == "Qwen2ForCausalLM"
    bias = architecture != "MistralForCausalLM" and not qwen2 and bool(given.get("attention_bias"))
    ends = given if generation is None else generation
    fields.check(ends, ENDS)
    stop, pad = ends.get("eos_token_id"), ends.get("pad_token_id")
    stop = () if stop is None else tuple(stop) if isinstance(stop, list) else (stop,)
    last = given["vocab_size"] - 1
    if not all(0 <= token <= last for token in (*stop, max(pad or 0, 0))):
        where = "" if generation is None else " of generation_config.json"
        got = f"got {stop} and {pad}"
        raise ValueError(f"eos_token_id and pad_token_id{where} must lie in 0 … {last}, {got}")
    rope, width = read_rope(given), given.get("head_dim")
    width = width or given["hidden_size"] // given["num_attention_heads"]
    if isinstance(rope, ropes.LongRope) and 2 * len(rope.short_factors) != width:
        must = f"short_factor must have a number for each pair of {width} features"
        raise ValueError(f"{must}, got {len(rope.short_factors)}")
    return Config(
        vocabulary=given["vocab_size"],
        features=given["hidden_size"],
        num_layers=given["num_hidden_layers"],
        num_heads=given["num_attention_heads"],
        num_kv_heads=given.get("num_key_value_heads"),
        head_features=given.get("head_dim"),
        mlp_features=given["intermediate_size"],
        rope=rope,
        window=_windows(architecture, given),
        qkv_bias=bias or qwen2,
        out_bias=bias,
        mlp_bias=architecture == "LlamaForCausalLM" and bool(given.get("mlp_bias")),
        normalize_qk=architecture == "Qwen3ForCausalLM",
        epsilon=given["rms_norm_eps"],
        tied=bool(given["tie_word_embeddings"]),
        max_length=given["max_position_embeddings"],
        stop=stop,
        pad=pad if pad is not None and pad >= 0 else None,
    )


def architectures(config: Json) -> list[str]:
    """The architectures that a config.json lists, or the one that it has in the place of a list.

    Example:
      >>> architectures({"architectures": "BertModel"}), architectures({})
      (['BertModel'], [])
    """
    named = config.get("architectures") or []
    return [named] if isinstance(named, str) else list(named)


def architecture_of(config: Json) -> str:
    """The architecture that a config.json names.

    Raises:
      ValueError: it is not known, or it contradicts the model's type.

    Example:
      >>> architecture_of({"model_type": "qwen3"})
      'Qwen3ForCausalLM'
    """
    named, kind = architectures(config), config.get("model_type")
    known = ", ".join(ARCHITECTURES)
    if len(named) > 1 or any(name not in ARCHITECTURES for name in named):
        got = f"{', '.join(named)}, and model_type {kind!r}"
        raise ValueError(f"architectures must be one of {known}, or of BERT, got {got}")
    fitting = [name for name, own in ARCHITECTURES.items() if own["model_type"] == kind]
    if named and kind is not None and fitting != named:
        raise ValueError(f"config.json contradicts itself: {named[0]}, but model_type {kind!r}")
    if not named and not fitting:
        raise ValueError(f"config.json names no architecture of {known}; model_type is {kind!r}")
    return str((named or fitting)[0])


def _check_supported(given: Json) -> None:
    activation = given.get("hidden_act", "silu")
    if activation not in {"silu", "swish"}:
        raise ValueError(f"hidden_act must be 'silu', got {activation!r}")
    if given.get("quantization_config"):
        raise ValueError("quantization_config: CausalLM takes weights that are not quantized")


def _windows(architecture: str, given: Json) -> int | tuple[int | None, ...] | None:
    """The window of every layer, or of each."""
    number, window = given["num_hidden_layers"], given.get("sliding_window")
    kinds = given.get("layer_types")
    if architecture == "LlamaForCausalLM":
        if kinds and set(kinds) != {"full_attention"}:
            raise ValueError(f"layer_types of {architecture} must be full_attention, got {kinds}")
        return None  # transformers reads no window here
    if architecture == "MistralForCausalLM" and not kinds:
        return window
    if not kinds:
        if not given["use_sliding_window"] or window is None:
            return None
        first = given["max_window_layers"]
        return tuple(window if layer >= first else None for layer in range(number))
    if len(kinds) != number or not set(kinds) <= {"full_attention", "sliding_attention"}:
        must = f"layer_types must hold full_attention or sliding_attention for {number} layers"
        raise ValueError(f"{must}, got {kinds}")
    if "sliding_attention" not in kinds:
        return None
    if not given.get("use_sliding_window", True):
        raise ValueError("layer_types holds sliding_attention, but use_sliding_window is false")
    if window is None:
        raise ValueError("layer_types holds sliding_attention, but there is no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_rope(given: Json) -> ropes.Rope:
    """The rope of a config.json in the old or the new spelling.

    Where both are there, `rope_scaling` wins over `rope_parameters`, what is inside of them over
    what stands beside them, and `rope_type` over `type`: so does `transformers`.

    Raises:
      ValueError: the type is not known, or a number that it needs is missing.

    Example:
      >>> read_rope({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}})
      Linear(base=1000000.0, factor=2.0)
    """
    inside = dict(given.get("rope_scaling") or given.get("rope_parameters") or {})
    fields.check(inside, _ROPE_KINDS)
    kind = str(inside.get("rope_type", inside.get("type", "default")))
    theta = inside.get("rope_theta", given.get("rope_theta"))
    base = 10000.0 if theta is None else float(theta)
    part = inside.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    if part not in {None, 1}:
        raise ValueError(f"partial_rotary_factor must be 1 in this family, got {part}")
    if kind not in _READERS:
        raise ValueError(f"rope_type must be one of {', '.join(_READERS)}, got {kind!r}")
    inside = {name: number for name, number in inside.items() if number is not None}
    longest = given.get("max_position_embeddings", 2048)
    original = given.get("original_max_position_embeddings") or inside.get(
        "original_max_position_embeddings", longest
    )
    inside |= {"longest": longest, "original": original}
    try:
        return _READERS[kind](base, inside)
    except KeyError as error:
        raise ValueError(f"rope_type {kind!r} needs {error.args[0]}") from None
    except OverflowError:
        raise ValueError(f"rope_type {kind!r} has numbers that are far too large") from None


def _read_yarn(base: float, given: Json) -> ropes.Rope:
    factor = given.get("factor", given["longest"] / given["original"])
    attention = given.get("attention_factor")
    scale, scale_of_all = given.get("mscale"), given.get("mscale_all_dim")
    if attention is None and scale and scale_of_all:
        over, under = (
            ropes.Yarn(factor=factor ** float(power)).scale for power in (scale, scale_of_all)
        )
        attention = over / under  # 0.1 m ln f + 1 is the scale of the factor f^m
    return ropes.Yarn(
        base, factor, given["original"], given.get("beta_fast") or 32.0,
        given.get("beta_slow") or 1.0, given.get("truncate", True), attention,
    )  # fmt: skip


def _read_longrope(base: float, given: Json) -> ropes.Rope:
    return ropes.LongRope(
        base, tuple(given["short_factor"]), tuple(given["long_factor"]), given["original"],
        given.get("factor", given["longest"] / given["original"]), given.get("attention_factor"),
    )  # fmt: skip


_READERS: Mapping[str, Any] = MappingProxyType(
    {
        "default": lambda base, given: ropes.Rope(base),
        "linear": lambda base, given: ropes.Linear(base, given["factor"]),
        "dynamic": lambda base, given: ropes.Dynamic(base, given["factor"], given["longest"]),
        "llama3": lambda base, given: ropes.Llama3(
            base, given["factor"], given["low_freq_factor"], given["high_freq_factor"],
            given["original"],
        ),
        "yarn": _read_yarn,
        "longrope": _read_longrope,
    }
)  # fmt: skip


def write_config(config: Config, architecture: str | None = None, *, dtype: str) -> dict[str, Any]:
    """A config.json from which `transformers` makes the same model.

    Args:
      config: of the `CausalLM`.
      architecture: a name of `ARCHITECTURES`; None: the first that can express the config.
      dtype: of the weights, such as "bfloat16".

    Raises:
      ValueError: the architecture, or none, can express the config.

    Example:
      >>> written = write_config(Config.preset("qwen3-0.6b"), dtype="bfloat16")
      >>> written["architectures"], written["rope_parameters"]
      (['Qwen3ForCausalLM'], {'rope_type': 'default', 'rope_theta': 1000000.0})
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture must be one of {known}, got {architecture!r}")
    wanted = [name for name in ARCHITECTURES if _expresses(name, config)]
    if architecture is not None and architecture not in wanted:
        can = ", ".join(wanted) or "none"
        raise ValueError(f"{architecture} cannot express {config}; these can: {can}")
    if not wanted:
        raise ValueError(f"no architecture of {', '.join(ARCHITECTURES)} can express {config}")
    architecture = architecture or wanted[0]
    stop = list(config.stop)
    written = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture]["model_type"],
        "dtype": dtype,
        "vocab_size": config.vocabulary,
        "hidden_size": config.features,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_features or config.features // config.num_heads,
        "intermediate_size": config.mlp_features,
        "hidden_act": "silu",
        "rms_norm_eps": config.epsilon,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_length,
        "attention_dropout": 0.0,
        "eos_token_id": stop[0] if len(stop) == 1 else stop or None,
        "pad_token_id": config.pad,
    }
    return written | _write_rope(config) | _write_form(architecture, config)


def _expresses(architecture: str, config: Config) -> bool:
    """Whether an architecture has models of this config."""
    windows, biases = set(config.windows), config.qkv_bias or config.out_bias
    same, kinds = config.qkv_bias == config.out_bias, windows - {None}
    if isinstance(config.rope, ropes.Dynamic) and config.rope.max_length != config.max_length:
        return False
    return {
        "LlamaForCausalLM": not kinds
        and same
        and not config.normalize_qk
        and config.features % config.num_heads == 0,  # asked for whatever the width of a head
        "MistralForCausalLM": len(windows) == 1
        and not (biases or config.mlp_bias or config.normalize_qk),
        "Qwen2ForCausalLM": config.qkv_bias
        and len(kinds) <= 1
        and not (config.out_bias or config.mlp_bias or config.normalize_qk),
        "Qwen3ForCausalLM": config.normalize_qk
        and same
        and len(kinds) <= 1
        and not config.mlp_bias,
    }[architecture]


def _write_form(architecture: str, config: Config) -> dict[str, Any]:
    """What only some of the architectures have."""
    windows = config.windows
    window = next((window for window in windows if window is not None), None)
    if architecture == "LlamaForCausalLM":
        return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if architecture == "MistralForCausalLM":
        return {"sliding_window": window}
    kinds = ["full_attention" if each is None else "sliding_attention" for each in windows]
    form: dict[str, Any] = {
        "use_sliding_window": window is not None, "sliding_window": window, "layer_types": kinds,
        "max_window_layers": next(
            (layer for layer, each in enumerate(windows) if each is not None), len(windows)
        ),
    }  # fmt: skip
    if architecture == "Qwen3ForCausalLM":
        form["attention_bias"] = config.qkv_bias
    return form


def _write_rope(config: Config) -> dict[str, Any]:
    """The rope in the new spelling, and in the old one for those who read no other."""
    rope: Any = config.rope
    written: dict[str, Any] = {"rope_type": _TYPES[type(rope)], "rope_theta": rope.base}
    if isinstance(rope, ropes.Linear | ropes.Dynamic | ropes.Llama3 | ropes.Yarn | ropes.LongRope):
        written["factor"] = rope.factor
    if isinstance(rope, ropes.Llama3 | ropes.Yarn | ropes.LongRope):
        written["original_max_position_embeddings"] = rope.original_length
    if isinstance(rope, ropes.Llama3):
        written["low_freq_factor"] = rope.low_frequency_factor
        written["high_freq_factor"] = rope.high_frequency_factor
    if isinstance(rope, ropes.Yarn):
        written |= {"beta_fast": rope.fast, "beta_slow": rope.slow, "truncate": rope.truncate}
    if isinstance(rope, ropes.Yarn | ropes.LongRope) and rope.attention_factor is not None:
        written["attention_factor"] = rope.attention_factor
    if isinstance(rope, ropes.LongRope):
        written["short_factor"] = list(rope.short_factors)
        written["long_factor"] = list(rope.long_factors)
    both = {"rope_parameters": written, "rope_theta": rope.base}
    return both if type(rope) is ropes.Rope else both | {"rope_scaling": written}


_TYPES: Mapping[type[ropes.Rope], str] = MappingProxyType(
    {
        ropes.Rope: "default",
        ropes.Linear: "linear",
        ropes.Dynamic: "dynamic",
        ropes.Llama3: "llama3",
        ropes.Yarn: "yarn",
        ropes.LongRope: "longrope",
    }
)
