r"""DeepCluster-v2, ResNet-50, ImageNet: the official 800-epoch recipe.

Paper      Caron et al. 2020, arXiv 2006.09882, appendix; 2×224 + 6×96 crops, batch 4096, three
           heads of 3,000 clusters, both large crops in the memory bank.
Recipe     facebookresearch/swav, scripts/deepclusterv2_800ep_pretrain.sh, and with words after the
           colon the scripts for 400 epochs; VISSL's
           pretrain/deepcluster_v2/deepclusterv2_2crops_resnet.yaml.
Hardware   64 V100 GPUs (32 GB); the official repository reports 3 min 13 s an epoch with
           2×160 + 4×96 crops, so 21 hours for 400 epochs.
Accuracy   ImageNet linear top-1, as reported by the official repository: 75.2% after 800 epochs,
           74.3% after 400 with 2×160 + 4×96, 70.2% after 400 with 2×224.
Run        python -m swav_jax.main --config configs/deepclusterv2_r50.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: those of swav_r50.py; 800 epochs by default.

Before the first step an epoch of images fills the memory bank, without gradients. Then every epoch
begins with k-means of the bank (1.28 million × 128, ten iterations for each head), in its first
step. The prototypes are the centroids; no optimizer moves them.
"""

from swav_jax.config import recipes


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    config = recipes.on_gpus(arg, epochs='800')
    config.method = 'deepcluster_v2'
    config.model.head.num_clusters *= 3
    if config.data.size_crops == (160, 96):  # larger ones than in SwAV's recipe with these sizes
        config.data.crop_scales = ((0.08, 1.0), (0.05, 0.14))
    config.model.temp_frozen_params_iter_map = ()
    return config
