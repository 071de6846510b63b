r"""SwAV, ResNet-50, with prototypes whose shares of the images fall off like a power law.

Paper      the method of Caron et al. 2020, arXiv 2006.09882, without its equal shares; for data
           whose classes are not equally frequent.
Recipe     vissl/configs/config/pretrain/swav/ablation/swav_8node_resnet_powerlaw.yaml (100 epochs,
           exponent 0.25).
Hardware   64 GPUs for the batch of 4,096; VISSL reports no hours.
Accuracy   VISSL reports none.
Run        python -m swav_jax.main --config configs/swav_r50_powerlaw.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: those of swav_r50.py; 100 epochs by default.
"""

from swav_jax.config import recipes


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    config = recipes.imagenet(arg, epochs='100')
    config.loss.shk_powerlaw = 0.25
    return config
