r"""SwAV, ResNet-50 of twice the width (94 million parameters), ImageNet.

Paper      Caron et al. 2020, arXiv 2006.09882, figure 3; 2×224 + 4×96 crops, batch 4096, no queue.
Recipe     vissl/configs/config/pretrain/swav/models/resnet50_w2.yaml, which equals
           scripts/swav_RN50w2_400ep_pretrain.sh of the official repository.
Hardware   128 V100 GPUs (32 GB), 32 images each; no hours reported.
Accuracy   ImageNet linear top-1, as reported by the official repository: 77.3% after 400 epochs.
Run        python -m swav_jax.main --config configs/swav_r50w2.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: those of swav_r50.py; crops are 2x224+4x96 by default.
"""

from swav_jax.config import recipes


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    config = recipes.imagenet(arg, crops='2x224+4x96', hidden=8192)
    config.model.trunk.width_multiplier = 2.0
    config.data.batchsize_per_replica = 32
    return config
