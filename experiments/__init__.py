"""Experiments: each script tests one claim, then prints and plots the result.

Run one with `python -m experiments.NAME` from the root.
"""


class BadInput(ValueError):
    """A mistake in what the user gave; scripts print its message without a traceback and stop."""
