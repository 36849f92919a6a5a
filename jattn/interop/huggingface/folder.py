"""What a folder of `transformers` holds, read without leaving it and without trust in it."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jattn.interop import json_files
from jattn.interop.errors import ConversionError, FileError
from jattn.interop.tensor_files import pickled, safetensors_of
from jattn.interop.tensors import Stored

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MOST_JSON = {"tokenizer.json": 2**28, INDEX: 2**24, PICKLE_INDEX: 2**24}
_MOST = 2**22  # bytes of any other


def path_in(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The path of a file of the folder; None: there is none.

    A link may lead to another file of the folder, or to where `huggingface_hub` keeps the files of
    its snapshots; nowhere else.

    Raises:
      FileError: (a ValueError) the name or its link leads out of the folder, or to no file.

    Example:
      >>> path_in(pathlib.Path("."), "../model.safetensors")
      Traceback (most recent call last):
      jattn.interop.errors.FileError: '../model.safetensors' is no name of a file in the folder .
    """
    if name in {"", ".", ".."} or any(sign in name for sign in "/\\:\0"):
        raise FileError(f"{name[:200]!r} is no name of a file in the folder {folder}")
    path = folder / name
    try:
        root, target = folder.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name too long
        raise FileError(f"{str(path)[:300]} cannot be opened: {error}") from None
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(each) for each in inside):
        raise FileError(f"{path} leads out of the folder, to {target}")
    if not target.is_file():
        raise FileError(f"{path} is no file")
    return path


def json_of(folder: pathlib.Path, name: str) -> Any:
    """The contents of a JSON file of the folder.

    Raises:
      FileNotFoundError: there is none.
      FileError: (a ValueError) it is no JSON, or far too large.
    """
    return json_files.parse(_bytes_of(folder, name), folder / name)


def _bytes_of(folder: pathlib.Path, name: str) -> bytes:
    path, most = path_in(folder, name), _MOST_JSON.get(name, _MOST)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no {name}")
    if path.stat().st_size > most:
        raise FileError(f"{path} has {path.stat().st_size} bytes, more than {most}")
    return path.read_bytes()


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Let a `ValueError` name the file whose contents it is about."""
    try:
        yield
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None


def tensors_of(folder: pathlib.Path) -> dict[str, Stored]:
    """Every tensor of the folder by its name, from the files that the index names.

    Safetensors are read where there are any; else pickles, by PyTorch's weights-only loader.

    Raises:
      FileNotFoundError: a file is not there.
      FileError: (a ValueError) a file cannot be read, or leads out of the folder; a tensor lies in
        two files.
      ConversionError: (a ValueError) a file does not hold a tensor that the index names.
    """
    # As transformers: a whole file even where there is an index, too
    for whole, index, reader in ((WEIGHTS, INDEX, safetensors_of), (PICKLE, PICKLE_INDEX, pickled)):
        if path := path_in(folder, whole):
            return reader(path)
        if path_in(folder, index):
            return _sharded(folder, index, reader)
    others = sorted(path.name for end in ("bin", "pt", "pth") for path in folder.glob(f"*.{end}"))
    hint = f"; it holds {', '.join(others)}: save them as {WEIGHTS}" if others else ""
    raise FileNotFoundError(f"{folder} holds no {WEIGHTS} and no {INDEX}{hint}")


def _sharded(
    folder: pathlib.Path, index: str, reader: Callable[[pathlib.Path], dict[str, Stored]]
) -> dict[str, Stored]:
    said = json_of(folder, index)
    where = said.get("weight_map") if isinstance(said, Mapping) else None
    if not isinstance(where, Mapping) or not all(isinstance(file, str) for file in where.values()):
        raise FileError(f"{folder / index} has no weight_map of names and files")
    shards: dict[str, dict[str, Stored]] = {}
    for file in dict.fromkeys(where.values()):
        try:
            path = path_in(folder, file)
        except FileError as error:
            raise FileError(f"{folder / index}: {error}") from None
        if path is None:
            raise FileNotFoundError(f"{index} names {file}, which {folder} does not hold")
        shards[file] = reader(path)
    absent = [f"{name} (in {file})" for name, file in where.items() if name not in shards[file]]
    if absent:
        hint = f"the shards do not hold all that {folder / index} says"
        raise ConversionError(missing=sorted(absent), hint=hint)
    held: dict[str, str] = {}
    for file, shard in shards.items():
        if twice := sorted(held.keys() & shard.keys()):
            both = f"{held[twice[0]]} and {file}"
            raise FileError(f"{twice[0]} lies in two files of {folder}: {both}")
        held |= dict.fromkeys(shard, file)
    return {name: shards[file][name] for name, file in where.items()}


def check_tokenizer(folder: pathlib.Path, vocabulary: int) -> None:
    """More rows than tokens are usual; more tokens than rows would have no embedding.

    Raises:
      FileError: (a ValueError) there are more tokens, or the file is none of a tokenizer.
    """
    if path := path_in(folder, "tokenizer.json"):
        ids = _token_ids(path, json_of(folder, path.name))
    elif path := path_in(folder, "vocab.txt"):
        try:
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise FileError(f"{path} is no UTF-8: {error}") from None
        ids = list(range(len(lines)))
    else:
        return
    if ids and max(ids) >= vocabulary:
        must = f"vocab_size = {vocabulary} rows of embeddings"
        raise FileError(f"{path} has a token of id {max(ids)}, but config.json {must}")


def _token_ids(path: pathlib.Path, tokenizer: Any) -> list[int]:
    """The ids of a tokenizer.json."""
    try:
        words = tokenizer["model"]["vocab"]
        ids = list(words.values()) if isinstance(words, dict) else list(range(len(words)))
        ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    except (KeyError, TypeError, AttributeError):
        ids = [None]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise FileError(f"{path} is no tokenizer that the library tokenizers writes")
    return ids
