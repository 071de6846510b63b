"""SwAV pretraining in JAX."""
