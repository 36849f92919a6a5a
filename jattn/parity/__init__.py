"""Parity with PyTorch: the table of systems, fixtures, and the comparison of ports with them."""
