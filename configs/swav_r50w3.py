r"""SwAV, ResNet-50 of three times the width, ImageNet: the recipe of swav_r50.py.

Paper      the method of Caron et al. 2020, arXiv 2006.09882, which does not train this width.
Recipe     vissl/configs/config/pretrain/swav/models/resnet50_w3.yaml.
Hardware   64 GPUs for the batch of 4,096; VISSL reports no hours.
Accuracy   VISSL reports none.
Run        python -m swav_jax.main --config configs/swav_r50w3.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: those of swav_r50.py.
"""

from swav_jax.config import recipes


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    config = recipes.imagenet(arg, hidden=6144)
    config.model.trunk.width_multiplier = 3.0
    return config
