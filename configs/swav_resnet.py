r"""SwAV, ResNets of other depths, ImageNet: the recipe of swav_r50.py with another trunk.

Paper      the method of Caron et al. 2020, arXiv 2006.09882, which trains only ResNet-50.
Recipe     vissl/configs/config/pretrain/swav/models/resnet18.yaml and resnet34.yaml; for r101
           swav_8node_resnet.yaml with DEPTH 101. VISSL has none for r152 and r200.
Hardware   64 GPUs for the batch of 4,096; VISSL reports no hours.
Accuracy   VISSL reports none.
Run        python -m swav_jax.main --config configs/swav_resnet.py:r101 --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: r18, r34, r50 (default), r101, r152 or r200, and those of swav_r50.py.
"""

from swav_jax.config import recipes, trunks

DEPTHS = {f'r{depth}': depth for depth in trunks.BLOCKS}


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    (_, depth), arg = recipes.choose(arg, DEPTHS, 'r50')
    config = recipes.imagenet(arg)
    config.model.trunk.depth = depth
    return config
