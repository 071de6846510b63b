"""SwAV self-supervised pretraining of convnets in JAX (Caron et al. 2020, arXiv 2006.09882)."""

__version__ = '0.1.0'
