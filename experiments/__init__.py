"""Experiments: one script, one claim, a printed and plotted result: `python -m experiments.NAME` from the root."""


class BadInput(ValueError):
    """A mistake in what the user gave; scripts print its message without a traceback and stop."""
