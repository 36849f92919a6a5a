"""Ways to compute the same request; `tests/contract.py` holds what each must pass."""
