"""What exists only because XLA on the CPU is slow or hungry."""
