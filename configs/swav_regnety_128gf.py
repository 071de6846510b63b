r"""SwAV, RegNetY-128GF: the recipe of swav_r50.py with another trunk, no BatchNorm in the head.

Paper      the method of Caron et al. 2020, arXiv 2006.09882; SEER (Goyal et al. 2021, arXiv
           2103.01988) trains this trunk on images that nobody curated.
Recipe     vissl/configs/config/pretrain/swav/models/regnet128Gf.yaml; with the word proto16k the
           head of heads/d7392_d8192_d8192_d256_proto16k.yaml.
Hardware   VISSL reports none for ImageNet.
Accuracy   VISSL reports none for ImageNet.
Run        python -m swav_jax.main --config configs/swav_regnety_128gf.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: those of swav_r50.py.
"""

from swav_jax.config import recipes, trunks


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    config = recipes.imagenet(arg, hidden=7392, use_bn=False)
    config.model.trunk = trunks.section('regnet_y_128gf')
    return config
