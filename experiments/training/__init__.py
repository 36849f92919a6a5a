"""What every training script shares: run folders, checkpoints, the loop, pictures."""
