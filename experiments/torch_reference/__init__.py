"""PyTorch references, written from the systems' definitions, and a record of their results."""
