r"""SwAV, ResNet-50 of five times the width (586 million parameters), ImageNet.

Paper      Caron et al. 2020, arXiv 2006.09882, figure 3; 2×224 + 4×96 crops, batch 1536, a queue of
           one batch from the start, no BatchNorm in the head.
Recipe     vissl/configs/config/pretrain/swav/models/resnet50_w5.yaml. The official script
           swav_RN50w5_400ep_pretrain.sh has a peak of 4.8 where VISSL's scaling gives 1.8:
           --config.optimizer.param_schedulers.lr.auto_lr_scaling.base_value=0.8
Hardware   128 V100 GPUs (32 GB), 12 images each; no hours reported.
Accuracy   ImageNet linear top-1, as reported by the official repository: 78.5% after 400 epochs.
Run        python -m swav_jax.main --config configs/swav_r50w5.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: those of swav_r50.py; crops are 2x224+4x96 by default.
"""

from swav_jax.config import recipes


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    config = recipes.imagenet(arg, crops='2x224+4x96', hidden=10240, use_bn=False)
    config.model.trunk.width_multiplier = 5.0
    config.data.batchsize_per_replica = 12
    config.loss.queue.queue_length = 1536
    return config
