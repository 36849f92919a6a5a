"""Ways to compute the same attend, with the signature of `dense.attend`; what each must pass is `tests/contract.py`."""
