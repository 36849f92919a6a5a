"""Ways to compute the same attend. Every kernel has the signature of `dense.attend` and passes `tests/contract.py`."""
