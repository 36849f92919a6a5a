"""What the experiments share: command lines, run folders, checkpoints, the loop, pictures."""
