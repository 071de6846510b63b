"""Input: which images there are (`sources`) and how they reach the step (`pipeline`)."""
