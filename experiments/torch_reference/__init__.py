"""PyTorch references of the systems, written from their definitions, and the record of what they compute."""
