"""Byte-level byte-pair encoding, the tokenizer of GPT-2 and Llama 3: train one, or read a folder's.

Every text can be written, whatever its script, and is read back as it was.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from experiments import BadInput
from experiments.data.pairs import read_utf8

END = "<|end|>"  # of a document; its id is 0
BYTES = 256


def train(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Train a tokenizer; the same texts always give the same one.

    Id 0 is the end of a document, the bytes follow, then longer pieces.

    Args:
      texts: to learn from.
      vocabulary: number of ids, at most: few texts have fewer pieces.

    Raises:
      BadInput: the vocabulary cannot hold all bytes.

    Example:
      >>> tokenizer = train(["the cat sat on the mat"], 262)
      >>> tokenizer.decode(tokenizer.encode("Größe, 大きさ").ids)
      'Größe, 大きさ'
    """
    if vocabulary <= BYTES:
        raise BadInput(
            f"a vocabulary of {vocabulary} is too small: all bytes and the end are {BYTES + 1}"
        )
    # As special tokens the bytes keep their order, and so pairs of the same count keep theirs; a
    # tokenizer that knows them as special would not merge them
    known = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=known, limit_alphabet=0, show_progress=False
    )
    learned = _byte_level(BPE())
    learned.train_from_iterator(texts, trainer)
    found = json.loads(learned.to_str())["model"]
    tokenizer = _byte_level(BPE(found["vocab"], [tuple(pair) for pair in found["merges"]]))
    tokenizer.add_special_tokens([END])
    return tokenizer


def _byte_level(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, of any kind that `tokenizer.json` describes; it cuts nothing off.

    Raises:
      BadInput: the file is missing, or is no tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise BadInput(f"{folder} holds no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_str(read_utf8(path))
    except BadInput:
        raise
    except Exception as error:  # tokenizers raises no class of its own
        raise BadInput(f"{path} is no tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
