"""Models of `transformers`: their configs, and the names of their weights."""
