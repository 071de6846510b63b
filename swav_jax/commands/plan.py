"""`--plan`: the cost of a run, and warnings, before anything is spent."""

import math
import textwrap
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import methods, optim
from swav_jax.commands import fit
from swav_jax.commands.cost import Cost, cost
from swav_jax.commands.fit import size
from swav_jax.data import sources
from swav_jax.errors import UserError
from swav_jax.parallel import mesh as meshes
from swav_jax.state import make_schedule

IMAGENET = 1_281_167  # images of the training set
# JPEGs of 500×375 that a core decodes onto a canvas of 512² per second, boxes included.
DECODED_PER_CORE = 750
DEVICES_PER_PROCESS = 8  # for group_size=-1, if the plan is for more devices than there are here
IMAGES_PER_PROTOTYPE = 20  # fewer hardly make a cluster
INDENT = ' ' * 4  # of a reason under its setting
CURVE = (60, 8)  # columns and rows of the plot


def show(
    config: ConfigDict, replicas: int, images_per_second: float, memory: float | None = None
) -> None:
    """Print the plan of a run.

    Args:
      config: the run's settings.
      replicas: number of devices; 0: those of this machine.
      images_per_second: that the host has to decode.
      memory: bytes of a device, for which micro-batches are proposed.

    Raises:
      UserError: a setting cannot work.
    """
    settings.validate(config)
    methods.make(config).check()
    replicas = replicas or jax.device_count()
    num_images, notes = count_images(config)
    local = min(replicas, DEVICES_PER_PROCESS)
    mesh = AbstractMesh(meshes.mesh_shape(config.model.sync_bn, replicas, local), meshes.AXES)
    sizes = settings.sizes(config, num_images=num_images, num_devices=replicas)
    schedule = make_schedule(config, sizes)
    found = cost(config, sizes, schedule, mesh)
    places = np.linspace(0, sizes.total_steps - 1, CURVE[0])
    rates = np.array([float(schedule(int(step))) for step in places])

    for name, value in settings.flatten(config):
        if name != 'config.choices':
            print(f'--{name}={settings.to_dict(value)}')
    print()
    for line in reasons(config):
        print(line)
    for label, text in describe(config, sizes, mesh, found, images_per_second):
        print(f'{label:<22}{text}')
    if memory is not None:
        print('\n'.join(['', *fit.proposal(config, sizes, schedule, mesh, found, memory)]))
    print(f'\nlearning rate over {sizes.total_steps:,} steps, up to {rates.max():.4g}')
    print('\n'.join(draw(rates, *CURVE)))
    warnings = [f'warning: {text}' for text in (*notes, *warn(config, sizes, schedule))]
    print()
    print('\n'.join(warnings or ['nothing to warn of']))


def count_images(config: ConfigDict) -> tuple[int, list[str]]:
    """The number of images; ImageNet's, with a note, if the source cannot be opened."""
    name, limit = config.data.source, config.data.limit
    try:
        source = sources.open_source(name, limit=limit, channels=config.data.channels)
    except UserError as error:
        assumed = limit or IMAGENET
        return assumed, [
            f'{error}; the plan assumes {assumed:,} images: --config.data.limit sets another number'
        ]
    return len(source), []


def reasons(config: ConfigDict) -> Iterator[str]:
    """Yield the settings that the recipe has chosen, and why; lines end with an empty one."""
    values = dict(settings.flatten(config))
    for name, reason in config.choices:
        value = f'={settings.to_dict(values[name])}' if name in values else ''
        yield f'{name}{value}'
        yield from textwrap.wrap(reason, 98, initial_indent=INDENT, subsequent_indent=INDENT)
    if config.choices:
        yield ''


def describe(
    config: ConfigDict,
    sizes: settings.Sizes,
    mesh: AbstractMesh,
    found: Cost,
    images_per_second: float,
) -> Iterator[tuple[str, str]]:
    """Yield labels and texts."""
    per_replica, turns = config.data.batchsize_per_replica, config.train.micro_batches
    groups, members = mesh.shape.values()
    groups *= turns
    replicas = f'{mesh.size} replicas'
    if turns > 1:
        replicas = f'{mesh.size} device{"s" * (mesh.size > 1)} × {turns} micro-batches'
    yield 'batch', f'{replicas} × {per_replica} = {sizes.batch_size:,} images'
    yield 'BatchNorm', f'{groups} group{"s" * (groups > 1)} of {members} replicas'
    yield (
        'steps',
        f'{sizes.steps_per_epoch:,} an epoch ({sizes.num_images:,} images), '
        f'{sizes.last_step:,} in all',
    )
    yield from methods.make(config).plan(sizes)
    yield 'parameters', f'{found.num_params:,}'
    yield (
        'FLOPs',
        f'{found.flops / 1e12:,.3g} T a step and device, '
        f'{found.flops / per_replica / turns / 1e9:,.3g} G an image, forward and backward',
    )
    if turns > 1:
        yield '', f'{found.repeated:.2f} times those of a batch at once: each forward pass twice'
    yield 'sent', f'{size(found.sent)} a step and device: all-reduced, gathered or scattered'
    yield 'memory per device', f'{size(found.memory)}, and what kernels need for a moment'
    for label, value in (
        ('parameters', found.params),
        ('gathered parameters', found.gathered),
        ('optimizer state', found.opt_state),
        ('gradients', found.gradients),
        ('kept for backward', found.kept),
        ('outputs', found.outputs),
        ('batch and crops', found.canvases + found.crops),
        *((f'method, {name}', part) for name, part in found.method.items()),
    ):
        if value:
            yield f'  {label}', size(value)
    cores = images_per_second / DECODED_PER_CORE
    yield (
        'host',
        f'{math.ceil(cores)} cores decode {images_per_second:,.0f} images/s (a core about '
        f'{DECODED_PER_CORE} of 500×375; --images_per_second)',
    )


def warn(config: ConfigDict, sizes: settings.Sizes, schedule: optim.Schedule) -> Iterator[str]:
    """Yield what will probably go wrong, and what helps."""
    yield from methods.make(config).warnings(sizes)
    prototypes = max(config.model.head.num_clusters)
    if sizes.num_images < IMAGES_PER_PROTOTYPE * prototypes:
        yield (
            f'{sizes.num_images:,} images are fewer than {IMAGES_PER_PROTOTYPE} for each of '
            f'{prototypes:,} prototypes: about {max(sizes.num_images // 100, 2):,} '
            '(config.model.head.num_clusters) would do'
        )
    frozen = max((n for _, n in config.model.temp_frozen_params_iter_map), default=0)
    if frozen >= sizes.last_step / 2:
        yield (
            f'config.model.temp_frozen_params_iter_map freezes for {frozen:,} of '
            f'{sizes.last_step:,} steps: {max(sizes.last_step // 100, 1):,} would be a hundredth'
        )
    yield from optim.unread(config.optimizer)
    lr = config.optimizer.param_schedulers.lr
    if lr['name'] == 'composite' and lr['schedulers'][0]['name'] == 'linear':
        steps = lr['lengths'][0] * sizes.total_steps
        start, peak = float(schedule(0)), float(schedule(max(int(steps), 1)))
        if start >= peak:
            yield (
                f'the warm-up does not climb: it begins at {start:.3g}, the peak for '
                f'{sizes.batch_size:,} images is {peak:.3g}: lower start_value in '
                'config.optimizer.param_schedulers.lr.schedulers'
            )
        if steps < 1:
            yield 'the warm-up is shorter than a step: lengthen it or train for more epochs'


def draw(values: np.ndarray, columns: int, rows: int) -> Iterator[str]:
    """Yield the lines of a plot of non-negative values, in steps of an eighth of a line."""
    blocks = ' ▁▂▃▄▅▆▇█'
    heights = np.ceil(values / max(values.max(), 1e-30) * rows * 8).astype(int)
    for row in reversed(range(rows)):
        yield ''.join(blocks[h] for h in np.clip(heights[:columns] - 8 * row, 0, 8)).rstrip()
