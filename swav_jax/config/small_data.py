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

from swav_jax import config as settings
from swav_jax.config.file import Changes, override
from swav_jax.config.schedules import warmup_cosine
from swav_jax.config.settings import MOST_PROTOTYPES_PER_IMAGE, SETTINGS
from swav_jax.errors import UserError

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
    """Chooses settings one after another; those on the command line win.

    Args:
      recipe: its name.
      changes: names and texts of the command line, see `override`.

    Attributes:
      config: the settings.
      given: the default settings with the changes.

    Raises:
      UserError: a change is of no setting, or to a value that the setting cannot have.
    """

    def __init__(self, recipe: str, changes: Changes):
        self.config = settings.default()
        self.config.recipe = recipe
        self.given = override(settings.default(), changes).lock()
        self._changes = changes
        for name, setting in SETTINGS.items():
            value = functools.reduce(getattr, name.split('.'), self.given)
            setting.kind.check(f'config.{name}', value)

    def __call__(self, name: str, value: Any, reason: str) -> Any:
        """Set `config.NAME`, note why, and return the value that the run will have."""
        *above, last = name.split('.')
        section = functools.reduce(getattr, above, self.config)
        section[last] = value
        override(self.config, self._changes_of(name))
        self.note(name, reason)
        return section[last]

    def note(self, name: str, reason: str) -> None:
        """Note why `config.NAME` is as it is, unless the command line changes it."""
        if not self._changes_of(name):
            self.config.choices += ((f'config.{name}', reason),)

    def _changes_of(self, name: str) -> list[tuple[str, str | None]]:
        """The changes of a setting or of a part of it."""
        full = f'config.{name}'
        parts = (f'{full}.', f'{full}[')
        return [change for change in self._changes if f'{change[0]}.'.startswith(parts)]


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
      batch: images of a replica, if there are enough.
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
    if not choose.given.data.source:
        choose.note('data.source', f'no images are named: the rest is for {num_images:,} of them')
    replicas = devices.replicas * choose.given.train.micro_batches
    in_all = batch * replicas
    while batch > 1 and in_all > LEAST_BATCH and 4 * in_all > num_images:
        batch //= 2
        in_all = batch * replicas
    batch = choose(
        'data.batchsize_per_replica',
        batch,
        f'a replica; {in_all:,} in all on {devices}, {num_images // in_all:,} steps an epoch',
    )
    in_all = batch * replicas
    few = num_images < 600
    clusters = choose(
        'model.head.num_clusters',
        (num_images // 20 if few else min(max(num_images // 100, 30), 3000),),
        f'one for 20 of {num_images:,} images: fewer than 30, because the images are few'
        if few
        else f'one for 100 of {num_images:,} images, from 30 to 3,000: about ten times the classes '
        'of many such sets',
    )
    prototypes = max(clusters)
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
    freeze = min(steps, max(steps * epochs // 50, 1))
    choose(
        'model.temp_frozen_params_iter_map',
        tuple((f'head/prototypes{i}', freeze) for i in range(len(clusters))),
        'one epoch, like the official script, but at most a fiftieth of the run',
    )
    optimizer = choose(
        'optimizer.name',
        'adamw',
        'like recipes of lightly for small sets; on the demo SGD ended half a percent lower',
    )
    if optimizer in ('adam', 'adamw'):
        choose.config.optimizer.use_larc = False
    else:
        base_value = 0.3  # as for ImageNet
    choose.config.optimizer.param_schedulers.lr = warmup_cosine(
        warmup=round(min(0.1, 10 / epochs), 4),
        base_value=base_value,
        start_value=1e-5,
        end_value=base_value,
    )
    choose.note(
        'optimizer.param_schedulers.lr',
        f'{base_value:g} for 256 images with {optimizer}, after a warm-up of 10 epochs, like '
        'VISSL, but at most a tenth of the run',
    )
