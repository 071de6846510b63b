"""What a run writes and reads: checkpoints, metrics, signals, failures."""
