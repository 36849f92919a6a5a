"""Tables of the weights as modules in PyTorch name them: a file for each family."""
