"""SwAV, ResNet-50, 400 epochs of ImageNet: VISSL's `swav_8node_resnet` recipe.

Paper      Caron et al. 2020, arXiv 2006.09882; 2×224 + 6×96 crops, batch 4096, no queue.
Recipe     vissl/configs/config/pretrain/swav/swav_8node_resnet.yaml.
Hardware   64 V100 GPUs (16 GB); the official repository reports 50 hours for 800 epochs.
Accuracy   ImageNet linear top-1, as reported by the official repository: 74.6% after 400 epochs,
           75.3% after 800, 73.9% after 200, 72.1% after 100.
Run        python -m swav_jax.main --config configs/swav_r50.py --workdir RUN \
               --config.data.source=folder:/imagenet/train

The argument after a colon is the number of epochs, with the warm-up that VISSL pairs with it:
`--config configs/swav_r50.py:800`. The learning rate follows the batch size: 4.8 at the peak for
4,096 images, 0.3 per 256.
"""

from swav_jax import config as settings
from swav_jax.errors import UserError

WARMUP = {100: 0.1, 200: 0.05, 400: 0.025, 800: 0.0125}  # share of the run, by epochs


def get_config(arg='400'):
    """The recipe for `arg` epochs."""
    if not arg.isdigit() or int(arg) not in WARMUP:
        raise UserError(
            f'--config configs/swav_r50.py:{arg}: the argument is the number of epochs, one of '
            f'{", ".join(map(str, WARMUP))}'
        )
    config = settings.default()
    config.optimizer.num_epochs = int(arg)
    config.optimizer.param_schedulers.lr = settings.warmup_cosine(warmup=WARMUP[int(arg)])
    return config
