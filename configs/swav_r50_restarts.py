r"""SwAV, ResNet-50, 100 epochs with one restart of the learning rate.

Paper      the method of Caron et al. 2020, arXiv 2006.09882; Loshchilov and Hutter 2017, arXiv
           1608.03983, for the restarts.
Recipe     vissl/configs/config/pretrain/swav/optimization/bs64_8node_cos_1restart_*.yaml.
Hardware   64 GPUs for the batch of 4,096; VISSL reports no hours.
Accuracy   VISSL reports none.
Run        python -m swav_jax.main --config configs/swav_r50_restarts.py:full --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: half (default: the rate falls and jumps back), full (it falls and climbs),
half_adaptive and full_adaptive (to where one cosine over the run would be), half_warmup (it climbs
again to less than half); and the crops and heads of swav_r50.py.
"""

from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax.config import recipes

WAVES = {
    'half': ('half', False),
    'full': ('full', False),
    'half_adaptive': ('half', True),
    'full_adaptive': ('full', True),
    'half_warmup': None,
}


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    (word, wave), arg = recipes.choose(arg, WAVES, 'half')
    config = recipes.imagenet(arg, epochs='100')
    lr = settings.warmup_cosine(warmup=0.1, start_value=0.6)
    climb, fall = lr.schedulers
    # VISSL scales these with the batch, but for two.
    lr.auto_lr_scaling.auto_scale = word not in ('full', 'half_warmup')
    if wave is None:
        again = piece('linear', 0.0048, 2.114), piece('cosine', 2.114, 0.0048)
        lr.schedulers = (climb, fall, *again)
        lr.lengths = (0.1, 0.45, 0.1, 0.35)
    else:
        wave_type, is_adaptive = wave
        restarts = piece('cosine_warm_restart', 4.8, 0.0048)
        restarts.wave_type = wave_type
        restarts.is_adaptive = is_adaptive
        restarts.restart_interval_length = 0.5 if wave_type == 'half' else 0.334
        restarts.lr_multiplier = 1.0
        lr.schedulers = (climb, restarts)
    lr.interval_scaling = ('rescaled',) * len(lr.schedulers)
    config.optimizer.param_schedulers.lr = lr
    return config


def piece(name, start, end):
    """One scheduler of a composite."""
    return ConfigDict(dict(name=name, start_value=start, end_value=end))
