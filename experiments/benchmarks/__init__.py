"""Speed, as ratios in one interleaved run."""
