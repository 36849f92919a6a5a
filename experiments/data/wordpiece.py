"""WordPiece, BERT's tokenizer: train one on texts, or read the one of a folder of a model.

The algorithm is that of the `tokenizers` package. A word becomes its longest known beginning, then
the longest known continuations, which begin with ##; a word that cannot be so written is [UNK].
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import WordPiece

from experiments import BadInput
from experiments.data.pairs import read_utf8

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MARKS = 2  # [CLS] and [SEP], which a sequence has besides its text


def train(
    texts: Sequence[str],
    vocabulary: int,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    characters: int = 1000,
    min_frequency: int = 2,
) -> Tokenizer:
    """Train a tokenizer; the same texts, in any order, always give the same one.

    The ids 0 … 4 are [PAD] [UNK] [CLS] [SEP] [MASK], characters follow, then longer pieces.

    Args:
      texts: to learn from.
      vocabulary: number of ids, at most: few texts have fewer pieces.
      lowercase: whether it reads A as a.
      strip_accents: whether it reads é as e; None: if `lowercase`.
      characters: at most so many are known, the most frequent ones.
      min_frequency: of two neighbours that become one piece.

    Raises:
      BadInput: the texts hold no word, or the vocabulary is too small for their characters.

    Example:
      >>> tokenizer = train(["the cat sat", "the hat sat"], 40)
      >>> tokenizer.encode("The SAT!").tokens
      ['[CLS]', 'the', 'sat', '[UNK]', '[SEP]']
    """
    options: dict[str, Any] = {"lowercase": lowercase, "strip_accents": strip_accents}
    tokenizer = _bert(dict.fromkeys(SPECIAL[1:2], 0), **options)
    known = [*SPECIAL, *_alphabet(tokenizer, texts, characters)]
    if len(known) == len(SPECIAL):
        raise BadInput("expected texts with words to train a tokenizer on, got none")
    if len(known) > vocabulary:
        raise BadInput(
            f"a vocabulary of {vocabulary} is too small: the characters alone are {len(known)}"
        )
    # The trainer numbers the alphabet in an order that changes from run to run, and pairs of the
    # same count by these numbers; as special tokens the characters keep their order
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, min_frequency=min_frequency, special_tokens=known,
        limit_alphabet=0, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return _bert(tokenizer.get_vocab(with_added_tokens=False), **options)


def _alphabet(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[str]:
    """The most frequent characters, then those of them that continue a word, in their order."""
    words: Counter[str] = Counter()
    for text in texts:
        text = tokenizer.normalizer.normalize_str(text)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    counts: Counter[str] = Counter()
    for word, count in words.items():
        counts.update(dict.fromkeys(word, count))
    frequent = sorted(sorted(counts), key=lambda character: -counts[character])[:most]
    inside = {character for word in words for character in word[1:]}
    return [*sorted(frequent), *(f"##{x}" for x in sorted(inside.intersection(frequent)))]


def _bert(
    vocabulary: Mapping[str, int],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    chinese: bool = True,
) -> Tokenizer:
    """BERT's tokenizer of a vocabulary; texts become [CLS] … [SEP] where it holds these."""
    tokenizer = Tokenizer(WordPiece(dict(vocabulary), unk_token="[UNK]"))
    tokenizer.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if "[CLS]" in vocabulary and "[SEP]" in vocabulary:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
    return tokenizer


def load(folder: Path | str) -> Tokenizer:
    """The tokenizer of a folder: of `tokenizer.json`, else of `vocab.txt`.

    It pads nothing, and cuts a text off at the length that the model was tuned for, whatever
    `tokenizer.json` says of these: `max_seq_length` of `sentence_bert_config.json`, else
    `model_max_length` of `tokenizer_config.json`, and never more than the model has positions.

    Raises:
      BadInput: a file is missing or cannot be read, or the vocabulary lacks a special token.
    """
    folder = Path(folder)
    tuned, given = (
        read_json(folder / name) for name in ("sentence_bert_config.json", "tokenizer_config.json")
    )
    path, lines = folder / "tokenizer.json", folder / "vocab.txt"
    if path.exists():
        tokenizer = _parsed(path)
    elif lines.exists():
        tokenizer = _of_lines(lines, given)
    else:
        raise BadInput(f"{folder} holds no tokenizer.json and no vocab.txt")
    if tuned.get("do_lower_case"):
        steps = [normalizers.Lowercase(), tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([step for step in steps if step is not None])
    positions = read_json(folder / "config.json").get("max_position_embeddings") or 512
    tokenizer.no_padding()
    lengths = tuned.get("max_seq_length"), given.get("model_max_length"), positions
    tokenizer.enable_truncation(_length(folder, *lengths))
    return tokenizer


def longest(tokenizer: Tokenizer) -> int:
    """The number of tokens, [CLS] and [SEP] among them, at which it cuts a text off."""
    cut = tokenizer.truncation
    if cut is None:
        raise ValueError("this tokenizer cuts nothing off")
    return cut["max_length"]


def _length(folder: Path, tuned: Any, given: Any, positions: Any) -> int:
    """The first of the lengths that is there, but no more than the last, the positions."""
    found = next(length for length in (tuned, given, positions) if length is not None)
    try:
        length = int(min(found, positions))
    except (TypeError, ValueError):
        length = 0
    if length <= MARKS:
        raise BadInput(f"{folder}: texts must be longer than {MARKS} tokens, got length {found!r}")
    return length


def _parsed(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(read_utf8(path))
    except BadInput:
        raise
    except Exception as error:  # tokenizers raises no class of its own
        raise BadInput(f"{path} is no tokenizer: {error}") from None


def _of_lines(path: Path, given: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a token in each line, whose number is its id."""
    tokens = read_utf8(path).removesuffix("\n").split("\n")
    vocabulary = {token.rstrip("\r"): number for number, token in enumerate(tokens)}
    absent = [token for token in SPECIAL[1:4] if token not in vocabulary]
    if absent:
        raise BadInput(f"{path} lacks {', '.join(absent)}")
    return _bert(
        vocabulary,
        lowercase=given.get("do_lower_case", True),
        strip_accents=given.get("strip_accents"),
        chinese=given.get("tokenize_chinese_chars", True),
    )


def read_json(path: Path) -> Mapping[str, Any]:
    """The object of a JSON file, or an empty one where there is no file.

    Raises:
      BadInput: it cannot be read, or is no object of JSON.
    """
    found = parsed_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise BadInput(f"{path}: expected an object of JSON, got {type(found).__name__}")
    return found


def parsed_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
      BadInput: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_utf8(path))
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is no JSON: {error}") from None
