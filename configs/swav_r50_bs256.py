r"""SwAV, ResNet-50, batch 256 with a queue: ImageNet on four GPUs.

Paper      Caron et al. 2020, arXiv 2006.09882, section 5.2 (small batches).
Recipe     scripts/swav_200ep_bs256_pretrain.sh and swav_400ep_bs256_pretrain.sh of the official
           repository: a queue of 3,840 from epoch 15 on, prototypes frozen for one epoch, no
           warm-up, cosine from 0.6 to 0.0006.
Hardware   4 V100 GPUs; the official repository reports 52 min 10 s an epoch, so 174 hours for 200
           epochs and 348 for 400.
Accuracy   ImageNet linear top-1, as reported by the official repository: 72.7% after 200 epochs,
           74.3% after 400.
Run        python -m swav_jax.main --config configs/swav_r50_bs256.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

Words after a colon: vissl, and those of swav_r50.py. `vissl` is optimization/bs64_4gpu.yaml, which
warms up from 0.3 and freezes for 313 iterations. On N devices set
--config.data.batchsize_per_replica to 256 / N.
"""

from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax.config import recipes


def get_config(arg=''):
    """The recipe, changed by the words in `arg`."""
    (_, vissl), arg = recipes.choose(arg, {'': False, 'vissl': True}, '')
    config = recipes.imagenet(arg)
    config.loss.queue.queue_length = 3840
    config.loss.queue.start_iter = 75075  # 15 epochs of 5,005 steps
    lr = config.optimizer.param_schedulers.lr
    warmup = settings.warmup_cosine(lr.lengths[0], base_value=0.6)
    if vissl:
        config.optimizer.param_schedulers.lr = warmup
        return config
    config.model.temp_frozen_params_iter_map = (('head/prototypes0', 5005),)
    config.optimizer.param_schedulers.lr = ConfigDict(
        dict(
            auto_lr_scaling=warmup.auto_lr_scaling,
            name='cosine',
            start_value=0.6,
            end_value=0.0006,
            update_interval='step',
        )
    )
    return config
