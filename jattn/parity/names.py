"""What the names of layers and weights tell."""

import difflib
import re

ROLES = ({"q", "wq", "query"}, {"k", "wk", "key"}, {"v", "wv", "value"})
WORDS = dict.fromkeys(["kernel", "scale", "embedding", "gamma"], "weight") | {"beta": "bias"}


def alike(name: str, path: str) -> float:
    """How alike two names are, by words and numbers and by letters: from 0 to 2.

    Example:
      >>> alike("norm1", "norm1"), alike("norm1", "out") < 1
      (2.0, True)
    """
    one, other = (re.findall(r"\d+|[a-z]+", each.lower()) for each in (name, path))
    return (
        difflib.SequenceMatcher(None, one, other).ratio()
        + difflib.SequenceMatcher(None, name, path).ratio()
    )


def plain(name: str) -> str:
    """The name with PyTorch's word for the kind of the weight.

    Example:
      >>> plain("out.kernel"), plain("norm.beta")
      ('out.weight', 'norm.bias')
    """
    *parents, leaf = name.split(".")
    return ".".join([*parents, WORDS.get(leaf, leaf)])


def role(name: str) -> int | None:
    """Which of query, key and value a layer's name means.

    Example:
      >>> [role(name) for name in ("to_q", "W_k", "value", "dense")]
      [0, 1, 2, None]
    """
    words = {*re.findall("[a-z]+", name.lower())}
    return next((number for number, known in enumerate(ROLES) if words & known), None)
