r"""SwAV, RegNetY-400MF or another small RegNetY, ImageNet: the recipe of swav_r50.py.

Paper      the method of Caron et al. 2020, arXiv 2006.09882; Radosavovic et al. 2020, arXiv
           2003.13678.
Recipe     vissl/configs/config/pretrain/swav/models/regnet400mf.yaml, and regnet800mf, regnet1.6G,
           regnet3.2G: hidden layer as wide as the trunk's output.
Hardware   64 GPUs for the batch of 4,096; VISSL reports no hours.
Accuracy   VISSL reports none.
Run        python -m swav_jax.main --config configs/swav_regnety_400mf.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: 400mf (default), 800mf, 1_6gf or 3_2gf, and those of swav_r50.py.
"""

from swav_jax.config import recipes, trunks

WIDTHS = {'400mf': 440, '800mf': 768, '1_6gf': 888, '3_2gf': 1512}  # of the trunk's output


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    (name, width), arg = recipes.choose(arg, WIDTHS, '400mf')
    config = recipes.imagenet(arg, hidden=width)
    config.model.trunk = trunks.section(f'regnet_y_{name}')
    return config
