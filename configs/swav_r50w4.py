r"""SwAV, ResNet-50 of four times the width (375 million parameters), ImageNet.

Paper      Caron et al. 2020, arXiv 2006.09882, figure 3; 2×224 + 4×96 crops, batch 2560, a queue of
           one batch from the start.
Recipe     vissl/configs/config/pretrain/swav/models/resnet50_w4.yaml. The official script
           swav_RN50w4_400ep_pretrain.sh has a peak of 4.8 where VISSL's scaling gives 3.0:
           --config.optimizer.param_schedulers.lr.auto_lr_scaling.base_value=0.48
Hardware   64 V100 GPUs (32 GB), 40 images each; no hours reported.
Accuracy   ImageNet linear top-1, as reported by the official repository: 77.9% after 400 epochs.
Run        python -m swav_jax.main --config configs/swav_r50w4.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: those of swav_r50.py; crops are 2x224+4x96 by default, with its own scales.
"""

from swav_jax.config import recipes


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    config = recipes.imagenet(arg, crops='2x224+4x96', hidden=8192)
    if config.data.num_crops == (2, 4):
        config.data.crop_scales = ((0.08, 1.0), (0.08, 0.14))
    config.model.trunk.width_multiplier = 4.0
    config.data.batchsize_per_replica = 40
    config.loss.queue.queue_length = 2560
    return config
