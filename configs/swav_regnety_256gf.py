r"""SwAV, RegNetY-256GF (1.3 billion parameters), the network of SEER.

Paper      Goyal et al. 2021, Self-supervised Pretraining of Visual Features in the Wild, arXiv
           2103.01988.
Recipe     vissl/configs/config/pretrain/swav/models/regnet256Gf_1.yaml; with the word proto16k the
           head of heads/d10444_d8192_d8192_d256_proto16k.yaml, which SEER has. The rest is that of
           swav_r50.py; SEER itself trains with its own schedule and more Sinkhorn iterations.
Hardware   the paper trains on one billion uncurated images with 512 V100 GPUs (32 GB).
Accuracy   the paper reports 84.2% ImageNet top-1 after fine-tuning that model; none for this
           recipe on ImageNet alone.
Run        python -m swav_jax.main --config configs/swav_regnety_256gf.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: those of swav_r50.py. The trunk has 1,272,156,138 parameters and 10,444
features; with VISSL's head it is 1,382,964,678 in all.
"""

from swav_jax.config import recipes, trunks


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    config = recipes.imagenet(arg, hidden=10444, use_bn=False)
    config.model.trunk = trunks.section(
        'regnet', depth=27, w_0=640, w_a=230.83, w_m=2.53, group_width=373
    )
    return config
