"""ImageNet recipes, and the words after a config file's colon that choose among them.

`--config configs/swav_r50.py:200,2x160+4x96` is 200 epochs with these crops. Words stand in any
order; each chooses something else: epochs, crops or the head.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax.errors import UserError

Value = TypeVar('Value')

# VISSL pairs each length with a warm-up of 10 epochs, which is this share of the run.
WARMUP = {'100': 0.1, '200': 0.05, '400': 0.025, '800': 0.0125}

# Numbers, sizes and scales (shares of the image's area) of the crops.
CROPS = {
    '2x224+6x96': ((2, 6), (224, 96), ((0.14, 1.0), (0.05, 0.14))),
    '2x224+4x96': ((2, 4), (224, 96), ((0.14, 1.0), (0.05, 0.14))),
    '2x160+4x96': ((2, 4), (160, 96), ((0.14, 1.0), (0.05, 0.14))),
    '2x224': ((2,), (224,), ((0.08, 1.0),)),
    '6x160': ((6,), (160,), ((0.14, 1.0),)),
}

# VISSL's 64 replicas of 64 images on so many GPUs, with its BatchNorm groups of 512 images:
# micro-batches, images of each, GPUs of a group, what is computed again to save memory.
GPUS = {
    '': None,
    '1gpu': (8, 512, 1, 'block'),
    '2gpu': (8, 256, 2, 'block'),
    '4gpu': (8, 128, 4, 'none'),
    '8gpu': (8, 64, 8, 'none'),
    '16gpu': (4, 64, 8, 'none'),
    '32gpu': (2, 64, 8, 'none'),
    '64gpu': (1, 64, 8, 'none'),
}

# One more layer, a hidden layer of 4096, and SEER's head with 16,000 prototypes.
HEADS = ('head3', 'head4096', 'proto16k')


def imagenet(
    arg: str = '',
    *,
    epochs: str = '400',
    crops: str = '2x224+6x96',
    hidden: int = 2048,
    use_bn: bool = True,
) -> ConfigDict:
    """VISSL's SwAV recipe for ImageNet, `swav_8node_resnet`, with a ResNet-50.

    Args:
      arg: words that choose epochs (`WARMUP`), crops (`CROPS`) and a head (`HEADS`).
      epochs, crops: the words for these if `arg` has none.
      hidden: width of the head's hidden layers.
      use_bn: whether the head has BatchNorm.

    Raises:
      UserError: a word is unknown, or the second one of its kind.
    """
    (epochs, warmup), arg = choose(arg, WARMUP, epochs)
    (_, (num_crops, size_crops, crop_scales)), arg = choose(arg, CROPS, crops)
    dims = {'': (0, hidden, 128), 'head3': (0, hidden, hidden, 128), 'head4096': (0, 4096, 128)}
    dims['proto16k'] = (0, 8192, 8192, 256)
    (head, dims), arg = choose(arg, dims, '')
    if arg:
        raise UserError(
            f'--config: {arg!r} after the colon is not known here, or the second of its kind: give '
            f'epochs ({_listed(WARMUP)}), crops ({_listed(CROPS)}), a head ({_listed(HEADS)}), or '
            'what the head of the file names'
        )

    config = settings.default()
    config.optimizer.num_epochs = int(epochs)
    config.optimizer.param_schedulers.lr = settings.warmup_cosine(warmup)
    config.data.num_crops = num_crops
    config.data.size_crops = size_crops
    config.data.crop_scales = crop_scales
    config.model.head.dims = dims
    config.model.head.use_bn = use_bn
    if head == 'proto16k':
        config.model.head.use_bn = False
        config.model.head.num_clusters = (16000,)
    return config


def on_gpus(arg: str, **defaults: str) -> ConfigDict:
    """`imagenet`, with words for the number of GPUs (`GPUS`) that compute its 4,096 images."""
    (_, numbers), arg = choose(arg, GPUS, '')
    config = imagenet(arg, **defaults)
    if numbers is not None:
        turns, images, group, remat = numbers
        config.train.micro_batches, config.data.batchsize_per_replica = turns, images
        config.model.sync_bn.group_size, config.model.remat = group, remat
    return config


def choose(arg: str, choices: Mapping[str, Value], default: str) -> tuple[tuple[str, Value], str]:
    """The first word in `arg` that is a choice, or the default, with its value; the other words."""
    words = arg.split(',') if arg else []
    word = next((word for word in words if word in choices), default)
    if word in words:
        words.remove(word)
    return (word, choices[word]), ','.join(words)


def _listed(words: Iterable[Any]) -> str:
    return ', '.join(words)
