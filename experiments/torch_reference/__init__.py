"""PyTorch references, written from the systems' definitions, and a record of their results."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError("the references need PyTorch: pip install -e '.[torch]'")
