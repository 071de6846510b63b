"""Preparing a run: devices, images, network and state, new or from the last checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import methods, models, optim, torch_weights
from swav_jax.config import trunks
from swav_jax.data import pipeline, sources
from swav_jax.evaluate.online import OnlineEvaluation
from swav_jax.parallel import distributed
from swav_jax.parallel import mesh as meshes
from swav_jax.parallel.layout import Layout
from swav_jax.parallel.replicas import device_rows
from swav_jax.runs import resume
from swav_jax.runs.checkpoint import Checkpoints
from swav_jax.runs.nan_skip import SkipBatches, batch_of_step
from swav_jax.runs.workdir import write_config
from swav_jax.state import TrainState, make_schedule, make_state


@dataclass(frozen=True)
class Setup:
    """A run that is ready to train."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    source: sources.Source  # the images to train on
    sizes: settings.Sizes
    schedule: optim.Schedule  # the learning rate by step
    net: models.SwAVNet
    tx: optax.GradientTransformation
    layout: Layout
    evaluation: OnlineEvaluation
    checkpoints: Checkpoints
    about: dict[str, Any]  # what all checkpoints say of the run
    state: TrainState
    first_step: int  # steps done before
    notes: dict[str, Any]  # what a checkpoint holds beside the state, see `resume.read_notes`
    skips: int  # how often batches were skipped after a step that is not finite
    said: list[str]  # lines for the user

    def batches(self, first: int) -> Iterator[pipeline.Batch]:
        """This process's share of every batch from number `first` on."""
        turns = self.mesh.size, self.config.train.micro_batches
        rows = device_rows(self.sizes.batch_size, *turns)
        return pipeline.train_batches(
            self.source,
            self.config.data,
            seed=self.config.seed,
            global_batch=self.sizes.batch_size,
            rows=rows.reshape(jax.process_count(), -1)[jax.process_index()],
            first_step=first,
        )

    def batch_of_step(self, step: int) -> int:
        """Number of the batch that a step reads."""
        return batch_of_step(step, self.notes['left_out'])


def set_up(config: ConfigDict, workdir: Path, force: bool, skip: SkipBatches | None) -> Setup:
    """Prepare a run, from its last checkpoint if there is one.

    Args:
      config, workdir, force: as in `run`.
      skip: the batches to skip, from the last checkpoint on.

    Raises:
      UserError: a setting, the data or the checkpoint cannot work.
    """
    with distributed.failing_together():
        mesh = meshes.make_mesh(config.model.sync_bn)
        source = sources.open_source(
            config.data.source,
            limit=config.data.limit,
            channels=config.data.channels,
            cache_dir=str(workdir),
        )
        sizes = settings.sizes(config, num_images=len(source), num_devices=mesh.size)
        schedule = make_schedule(config, sizes)
        net, tx, layout, state = make_state(config, sizes, schedule, mesh)
        evaluation = OnlineEvaluation(config, net, mesh, workdir)
        group_images = mesh.shape['member'] * config.data.batchsize_per_replica
        about = resume.describe(config, sizes.batch_size, group_images, source)
    distributed.check_same(
        {f'config.data.source={config.data.source}': about['images']},
        'give the same images to all of them',
    )
    checkpoints = Checkpoints(
        workdir / 'checkpoints',
        keep=config.checkpoint.keep,
        keep_every_steps=config.checkpoint.keep_every_epochs * sizes.steps_per_epoch,
    )
    notes, said = {'results': {}, 'evaluated': False, 'left_out': []}, []
    written = config
    with distributed.failing_together():
        restored = resume.restore(checkpoints, layout, config, about, sizes.last_step, force)
        if restored is not None:
            state, notes, said = restored.state, restored.notes, restored.said
            config, written = restored.config, restored.written
            about |= {'config': settings.to_dict(config)}
        elif config.init_from:
            state = start_from(config, sizes, layout, state)
    first_step = int(state.step)
    if skip is not None:
        first = batch_of_step(first_step + 1, notes['left_out'])
        notes['left_out'].append([first, skip.last])
    if damaged := write_config(written, workdir):
        said.insert(0, damaged)
    return Setup(
        config=config,
        workdir=workdir,
        mesh=mesh,
        source=source,
        sizes=sizes,
        schedule=schedule,
        net=net,
        tx=tx,
        layout=layout,
        evaluation=evaluation,
        checkpoints=checkpoints,
        about=about,
        state=state,
        first_step=first_step,
        notes=notes,
        # Without a checkpoint in between, several skips are one range.
        skips=max(len(notes['left_out']), skip.count if skip else 0),
        said=said,
    )


def start_from(
    config: ConfigDict, sizes: settings.Sizes, layout: Layout, state: TrainState
) -> TrainState:
    """Return the state before the first step, with the weights of `config.init_from`.

    Raises:
      UserError: they cannot be read, or do not fit.
    """
    whole = layout.gather(state)
    loaded = torch_weights.load_into(
        jax.device_get({'params': whole.params, 'batch_stats': whole.batch_stats}),
        config.init_from,
        models.trunk_class(config.model.trunk),
        allow_partial=config.init_allow_partial,
    )

    def begin(whole: TrainState, loaded: dict[str, Any]) -> TrainState:
        batch_stats = loaded['batch_stats']
        params, own = methods.make(config).init(loaded['params'], batch_stats, sizes)
        return layout.pad(whole.replace(params=params, batch_stats=batch_stats, method=own))

    begin = jax.jit(begin, out_shardings=layout.shardings)
    return begin(whole, meshes.put(layout.mesh, loaded))


def introduce(setup: Setup, say: Callable[[str], None]) -> None:
    """Print in a few lines what is about to run."""
    config, sizes, first_step = setup.config, setup.sizes, setup.first_step
    count = sum(x.size for x in jax.tree.leaves(setup.layout.whole().params))
    device = setup.mesh.devices.flat[0]
    say(
        f'{trunks.title(config.model.trunk)}, {count / 1e6:.2f} M parameters, {config.precision}; '
        f'{setup.mesh.size} × {device.device_kind}'
    )
    say(
        f'{sizes.num_images:,} images of {config.data.source}, {sizes.batch_size} a step '
        f'({_share(config)}), {sizes.steps_per_epoch:,} steps '
        f'an epoch, {sizes.last_step:,} in all'
    )
    if config.data.channels != 3:
        say(
            f'images of config.data.channels={config.data.channels}: saturation, hue and grayscale '
            'are left out'
        )
    for line in optim.unread(config.optimizer):
        say(line)
    for line in methods.make(config).notes(sizes):
        say(line)
    if first_step:
        say(f'resuming from step {first_step:,}')
    for first, last in setup.notes['left_out']:
        say(f'without batches {first:,} to {last:,}, which led to a step that is not finite')
    lines = (*setup.source.notes, *setup.evaluation.notes, *setup.said)
    for line in dict.fromkeys(lines):
        say(line)


def _share(config: ConfigDict) -> str:
    """How many images of a step a device computes."""
    rows, turns = config.data.batchsize_per_replica, config.train.micro_batches
    return f'{rows} a device' if turns == 1 else f'{turns} micro-batches of {rows} a device'
