"""Recipes that choose their settings by the images and the devices, each with its reason.

configs/small_images.py and configs/own_images.py share what is here: `Choices` collects settings
and reasons, `choose_training` chooses all that depends on the number of images. `--plan` prints the
reasons.
"""

import functools
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax.config.schedules import warmup_cosine
from swav_jax.errors import UserError
from swav_jax.prototypes import MOST_PROTOTYPES_PER_IMAGE

LEAST_IMAGES = 64
LEAST_BATCH = 16  # on all devices
GPUS = Path('/proc/driver/nvidia/gpus')


class Devices(NamedTuple):
    """What a run will use: `count` GPUs, or the CPU if that is 0."""

    count: int

    @property
    def replicas(self) -> int:
        """Replicas of the network."""
        return max(self.count, 1)

    def __str__(self) -> str:
        return f'{self.count} GPU' + 's' * (self.count > 1) if self.count else 'the CPU'


def read_devices(words: str) -> Devices:
    """Read the words after a config file's colon: a number of GPUs, or `cpu`; '' finds out.

    Raises:
      UserError: they are something else.
    """
    if not words:
        cpu = os.environ.get('JAX_PLATFORMS') == 'cpu' or not GPUS.is_dir()
        return Devices(0 if cpu else len(list(GPUS.iterdir())))
    if words == 'cpu':
        return Devices(0)
    if words.isascii() and words.isdigit() and 1 <= int(words) <= 64:
        return Devices(int(words))
    raise UserError(
        f'--config: {words!r} after the colon: give the number of GPUs from 1 to 64, or cpu'
    )


class Choices:
    """Chooses settings one after another; those on the command line stay as they are.

    Args:
      recipe: its name.
      given: the default settings with the changes of the command line.

    Attributes:
      config: the settings.
    """

    def __init__(self, recipe: str, given: ConfigDict):
        self.config = settings.default()
        self._default = dict(settings.flatten(self.config))
        self._given = dict(settings.flatten(given))
        self.config.recipe = recipe

    def __call__(self, name: str, value: Any, reason: str) -> Any:
        """Set `config.NAME`, note why, and return the value that the run will have."""
        full = f'config.{name}'
        given = self._given.get(full, value)
        if given != self._default.get(full, given):
            return given
        *above, last = name.split('.')
        section = functools.reduce(getattr, above, self.config)
        section[last] = value
        self.note(name, reason)
        return value

    def note(self, name: str, reason: str) -> None:
        """Note why `config.NAME` is as it is."""
        self.config.choices += ((f'config.{name}', reason),)


def choose_training(
    choose: Choices,
    num_images: int,
    devices: Devices,
    *,
    batch: int,
    images_seen: int,
    epochs: tuple[int, int],
    base_value: float,
) -> None:
    """Choose all that depends on the number of images: batch, prototypes, queue, epochs, rates.

    Args:
      choose: gets the choices.
      num_images: of the run.
      devices: of the run.
      batch: images a device and step, if there are enough.
      images_seen: in the whole run, within `epochs`.
      epochs: least and largest number.
      base_value: learning rate of AdamW for 256 images.

    Raises:
      UserError: there are fewer than `LEAST_IMAGES` images.
    """
    if num_images < LEAST_IMAGES:
        raise UserError(
            f'config.data.source has {num_images} images: this recipe needs at least '
            f'{LEAST_IMAGES} to learn from; with fewer use the features of a trained network'
        )
    while batch * devices.replicas > LEAST_BATCH and 4 * batch * devices.replicas > num_images:
        batch //= 2
    batch = choose(
        'data.batchsize_per_replica',
        batch,
        f'a device; {batch * devices.replicas:,} in all on {devices}, at least 4 steps an epoch',
    )
    in_all = batch * devices.replicas
    prototypes = min(max(num_images // 100, min(30, num_images // 20)), 3000)
    (prototypes,) = choose(
        'model.head.num_clusters',
        (prototypes,),
        f'one for 100 of {num_images:,} images, from 30 to 3,000: about ten times the classes of '
        'many such sets',
    )
    low, high = epochs
    epochs = choose(
        'optimizer.num_epochs',
        min(max(round(images_seen / num_images), low), high),
        f'{images_seen:,} images seen in all, but from {low} to {high} epochs',
    )
    steps = max(num_images // in_all, 1)
    if prototypes > MOST_PROTOTYPES_PER_IMAGE * in_all:
        length = math.ceil(prototypes / in_all) * in_all
        choose(
            'loss.queue.queue_length',
            length,
            f'{prototypes:,} prototypes are more than {MOST_PROTOTYPES_PER_IMAGE} for each of the '
            f"batch's {in_all:,} images: the queue adds one for each prototype",
        )
        choose(
            'loss.queue.start_iter',
            steps * min(15, max(epochs // 10, 1)),
            'epoch 15, like the official script for batches of 256, but not after a tenth',
        )
    choose(
        'loss.epsilon',
        0.03,
        'sharper codes than the 0.05 of ImageNet, because a small batch has few images a '
        'prototype (official README; lightly and solo-learn use 0.01 to 0.05)',
    )
    choose(
        'model.temp_frozen_params_iter_map',
        (('head/prototypes0', min(steps, max(steps * epochs // 50, 1))),),
        'one epoch, like the official script, but at most a fiftieth of the run',
    )
    choose(
        'optimizer.name',
        'adamw',
        'LARC moves too slowly for some thousand steps (compared on the demo)',
    )
    choose.config.optimizer.use_larc = False
    choose.config.optimizer.param_schedulers.lr = warmup_cosine(
        warmup=round(min(0.1, 10 / epochs), 4),
        base_value=base_value,
        start_value=1e-5,
        end_value=base_value,
    )
    choose.note(
        'optimizer.param_schedulers.lr',
        f'AdamW: {base_value:g} for 256 images, after a warm-up of 10 epochs, like VISSL, but at '
        'most a tenth of the run',
    )
