r"""SwAV, ResNet-50, ImageNet: VISSL's `swav_8node_resnet` recipe.

Paper      Caron et al. 2020, arXiv 2006.09882; 2×224 + 6×96 crops, batch 4096, no queue.
Recipe     vissl/configs/config/pretrain/swav/swav_8node_resnet.yaml; with words after the colon
           also transforms/multicrop_*.yaml and the official repository's scripts.
Hardware   64 V100 GPUs (16 GB); the official repository reports 3 min 40 s an epoch, so 24 hours
           for 400 epochs and 49 for 800.
Accuracy   ImageNet linear top-1, as reported by the official repository: 72.1% after 100 epochs,
           73.9% after 200, 74.6% after 400, 75.3% after 800; 70.1% with 2×224 after 400.
Run        python -m swav_jax.main --config configs/swav_r50.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon, as configs/swav_r50.py:800 or configs/swav_r50.py:200,2x160+4x96:
  epochs   100, 200, 400 (default), 800, each with VISSL's warm-up of ten epochs
  crops    2x224+6x96 (default), 2x224+4x96, 2x160+4x96, 2x224, 6x160
  head     head3 (one layer more), head4096 (hidden layer of 4096), proto16k (SEER's, 16,000
           prototypes)
  GPUs     1gpu, 2gpu, 4gpu, 8gpu, 16gpu, 32gpu, 64gpu: for exactly so many, VISSL's batch of 4,096
           images and its BatchNorm groups of 512 (config.train.micro_batches). 1gpu and 2gpu
           compute activations again (config.model.remat)

The learning rate follows the batch size: 4.8 at the peak for 4,096 images, 0.3 per 256.
"""

from swav_jax.config import recipes


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    return recipes.on_gpus(arg)
