r"""SwAV, ResNet-50 of two to five times the width, ImageNet.

Paper      Caron et al. 2020, arXiv 2006.09882, figure 3, trains w2, w4 and w5.
Recipe     vissl/configs/config/pretrain/swav/models/resnet50_w2.yaml to resnet50_w5.yaml.
Hardware   V100 GPUs (32 GB); neither the official repository nor VISSL reports hours.
Accuracy   ImageNet linear top-1 after 400 epochs, as reported by the official repository.
Run        python -m swav_jax.main --config configs/swav_r50_wide.py:w4 --workdir RUN \
               --config.data.source=folder:/imagenet/train

       parameters   crops           GPUs × images   queue   accuracy
  w2   94 million   2×224 + 4×96     128 × 32        none    77.3%
  w3                2×224 + 6×96      64 × 64        none    none reported
  w4   375 million  2×224 + 4×96      64 × 40        2,560   77.9%
  w5   586 million  2×224 + 4×96     128 × 12        1,536   78.5%

w2 equals scripts/swav_RN50w2_400ep_pretrain.sh of the official repository. The queues hold one
batch, from the start. w4 has its own crop scales, w5 no BatchNorm in the head. For w4 and w5 the
official scripts have a peak learning rate of 4.8 where VISSL's scaling gives 3.0 and 1.8: set
--config.optimizer.param_schedulers.lr.auto_lr_scaling.base_value to 0.48 and 0.8.

Words after a colon: w2 (default), w3, w4 or w5, and those of swav_r50.py; crops are those of the
table by default.
"""

from swav_jax.config import recipes

# Width multiplier, width of the hidden layer, crops, images of a replica, length of the queue.
WIDTHS = {
    'w2': (2.0, 8192, '2x224+4x96', 32, 0),
    'w3': (3.0, 6144, '2x224+6x96', 64, 0),
    'w4': (4.0, 8192, '2x224+4x96', 40, 2560),
    'w5': (5.0, 10240, '2x224+4x96', 12, 1536),
}


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    (word, (multiplier, hidden, crops, batch, queue)), arg = recipes.choose(arg, WIDTHS, 'w2')
    config = recipes.imagenet(arg, crops=crops, hidden=hidden, use_bn=word != 'w5')
    if word == 'w4' and config.data.num_crops == (2, 4):
        config.data.crop_scales = ((0.08, 1.0), (0.08, 0.14))
    config.model.trunk.width_multiplier = multiplier
    config.data.batchsize_per_replica = batch
    config.loss.queue.queue_length = queue
    return config
