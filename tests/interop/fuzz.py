"""Seeded damage of a folder of weights: bytes, lengths, and fields of JSON."""

import json
import shutil
import struct

import numpy as np

VALUES = [
    None, True, False, -1, 0, 1, 2, 3, 7, 64, 10**6, 2**31, 2**63, 10**40, 1e-9, 0.5, 2.0, 1e300,
    "", "8", "llama", "bert", "linear", "../config.json", "\ud800", [], [1], ["a"], [[1]], {},
    {"a": 1}, {"rope_type": "linear", "factor": 2.0}, {"type": "yarn", "factor": "4"},
    ["sliding_attention"] * 2,
]  # fmt: skip
FIELDS = [
    "model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window",
    "layer_types", "max_window_layers", "max_position_embeddings", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "hidden_act", "eos_token_id", "pad_token_id", "dtype",
    "partial_rotary_factor", "original_max_position_embeddings", "quantization_config",
    "type_vocab_size", "id2label", "num_labels", "layer_norm_eps", "hidden_dropout_prob",
    "position_embedding_type", "is_decoder", "classifier_dropout",
]  # fmt: skip


def flipped(draw, raw):
    """Up to four bytes are others, most of them near the beginning, where the header lies."""
    raw = bytearray(raw)
    for _ in range(draw.integers(1, 5)):
        end = len(raw) if draw.random() < 0.3 else min(len(raw), 400)
        raw[draw.integers(end)] = draw.integers(256)
    return bytes(raw)


def truncated(draw, raw):
    return raw[: draw.integers(len(raw))]


def inserted(draw, raw):
    at = draw.integers(len(raw) + 1)
    return raw[:at] + draw.bytes(int(draw.integers(1, 40))) + raw[at:]


def swapped(draw, raw):
    """Two ranges of one length change places."""
    length = int(draw.integers(1, max(2, min(64, len(raw) // 2))))
    one, two = sorted(int(draw.integers(max(1, len(raw) - length))) for _ in range(2))
    if two < one + length:
        return raw[one:] + raw[:one]
    middle = raw[one + length : two]
    return (
        raw[:one] + raw[two : two + length] + middle + raw[one : one + length] + raw[two + length :]
    )


def edited(draw, contents):
    """JSON with a field changed, doubled or gone, at any depth."""
    if isinstance(contents, dict) and contents and draw.random() < 0.9:
        names = list(contents)
        name = names[draw.integers(len(names))]
        if draw.random() < 0.6:
            return contents | {name: edited(draw, contents[name])}
        kind = draw.integers(3)
        if kind == 0:
            return {key: value for key, value in contents.items() if key != name}
        if kind == 1:
            other = names[draw.integers(len(names))]
            return contents | {name: contents[other]}
        return contents | {FIELDS[draw.integers(len(FIELDS))]: VALUES[draw.integers(len(VALUES))]}
    if isinstance(contents, list) and contents and draw.random() < 0.7:
        at = int(draw.integers(len(contents)))
        return [*contents[:at], edited(draw, contents[at]), *contents[at + 1 :]]
    return near(draw, contents) if draw.random() < 0.6 else VALUES[draw.integers(len(VALUES))]


def near(draw, value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return [value + 1, value - 1, 2 * value, value * 10**3, -value][draw.integers(5)]
    if isinstance(value, str):
        return [value[1:], value + "_", value[::-1], "F16", "BF16", "F8_E4M3", "I32", "relu"][
            draw.integers(8)
        ]
    return value


def edited_json(draw, raw):
    return json.dumps(edited(draw, json.loads(raw))).encode()


def edited_header(draw, raw):
    """A header of safetensors whose length is right again."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = edited_json(draw, raw[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def damage(seed, source, folder):
    """A copy of the folder in which one or two files are damaged."""
    draw = np.random.default_rng(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    paths = sorted(folder.iterdir())
    for _ in range(1 + (draw.random() < 0.2)):
        path = paths[draw.integers(len(paths))]
        by_fields = edited_json if path.suffix == ".json" else edited_header
        changes = [flipped, truncated, inserted, swapped, by_fields, by_fields, by_fields]
        try:
            path.write_bytes(changes[draw.integers(len(changes))](draw, path.read_bytes()))
        except (ValueError, struct.error):  # two damages of one file: it is no JSON any more
            path.write_bytes(flipped(draw, path.read_bytes()) if path.stat().st_size else b"\0")
