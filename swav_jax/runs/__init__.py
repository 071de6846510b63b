"""What keeps a run: its folder, its checkpoints, its records, its failures."""
