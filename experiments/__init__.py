"""Experiments: each script tests one claim, then prints and plots the result.

Run one with `python -m experiments.NAME` from the root of the clone.
"""


class BadInput(ValueError):
    """A mistake in the user's input; a script prints its message without a traceback and exits."""
