r"""SwAV, RegNetY of 400 megaflops to 256 gigaflops, ImageNet: the recipe of swav_r50.py.

Paper      the method of Caron et al. 2020, arXiv 2006.09882; Radosavovic et al. 2020, arXiv
           2003.13678, for the trunks; SEER (Goyal et al. 2021, arXiv 2103.01988) trains the largest
           ones on images that nobody curated.
Recipe     vissl/configs/config/pretrain/swav/models/regnet400mf.yaml, regnet800mf, regnet1.6G,
           regnet3.2G, regnet16Gf, regnet128Gf, regnet256Gf_1; with the word proto16k the heads
           heads/d7392_d8192_d8192_d256_proto16k.yaml and d10444_….
Hardware   64 GPUs for the batch of 4,096 up to 3_2gf; VISSL reports no hours, and nothing for the
           larger ones on ImageNet. SEER trains 256gf on one billion images with 512 V100 GPUs
           (32 GB).
Accuracy   VISSL reports none. SEER reports 84.2% ImageNet top-1 after fine-tuning 256gf; none for
           this recipe on ImageNet alone.
Run        python -m swav_jax.main --config configs/swav_regnety.py:16gf --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: 400mf (default), 800mf, 1_6gf, 3_2gf, 16gf, 128gf or 256gf, and those of
swav_r50.py. The head's hidden layer is as wide as the trunk's output; from 16gf on the head has no
BatchNorm. 256gf is the network of SEER: its trunk has 1,272,156,138 parameters and 10,444 features,
with VISSL's head it has 1,382,964,678 parameters. SEER itself trains with its own schedule and more
Sinkhorn iterations.
"""

from swav_jax.config import recipes, trunks

# Width of the head's hidden layer, and whether it has BatchNorm.
HEADS = {
    '400mf': (440, True),
    '800mf': (768, True),
    '1_6gf': (888, True),
    '3_2gf': (1512, True),
    '16gf': (3024, False),
    '128gf': (7392, False),
    '256gf': (10444, False),
}


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    (word, (hidden, use_bn)), arg = recipes.choose(arg, HEADS, '400mf')
    config = recipes.imagenet(arg, hidden=hidden, use_bn=use_bn)
    if word == '256gf':  # which torchvision does not have
        config.model.trunk = trunks.section(
            'regnet', depth=27, w_0=640, w_a=230.83, w_m=2.53, group_width=373
        )
    else:
        config.model.trunk = trunks.section(f'regnet_y_{word}')
    return config
