r"""SwAV, ResNeXt-50 or -101, ImageNet: the recipe of swav_r50.py with another trunk.

Paper      the method of Caron et al. 2020, arXiv 2006.09882, which does not train this trunk; Xie
           et al. 2017, arXiv 1611.05431.
Recipe     vissl/configs/config/pretrain/swav/models/resnext50.yaml and resnext101.yaml.
Hardware   64 GPUs for the batch of 4,096; VISSL reports no hours.
Accuracy   VISSL reports none.
Run        python -m swav_jax.main --config configs/swav_resnext.py:101-32x8d --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: depth, groups and width of a group, 50-32x4d (default) or 101-32x4d, and the
same with 8d, 16d, 32d, 48d; and those of swav_r50.py.
"""

from swav_jax.config import recipes

NETWORKS = {
    f'{depth}-32x{width}d': (depth, width) for depth in (50, 101) for width in (4, 8, 16, 32, 48)
}


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    (_, (depth, width)), arg = recipes.choose(arg, NETWORKS, '50-32x4d')
    config = recipes.imagenet(arg)
    config.model.trunk.depth = depth
    config.model.trunk.groups = 32
    config.model.trunk.width_per_group = width
    return config
