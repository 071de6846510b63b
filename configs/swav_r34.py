r"""SwAV, ResNet-34, ImageNet: the recipe of swav_r50.py with another trunk.

Paper      the method of Caron et al. 2020, arXiv 2006.09882, which does not train this trunk.
Recipe     vissl/configs/config/pretrain/swav/models/resnet34.yaml.
Hardware   64 GPUs for the batch of 4,096; VISSL reports no hours.
Accuracy   VISSL reports none.
Run        python -m swav_jax.main --config configs/swav_r34.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: those of swav_r50.py.
"""

from swav_jax.config import recipes


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    config = recipes.imagenet(arg)
    config.model.trunk.depth = 34
    return config
