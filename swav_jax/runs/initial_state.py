"""The state that a run starts from: network, optimizer and numbers, laid over the mesh."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import models, optim, torch_weights
from swav_jax.config.schedule_checks import check_schedule
from swav_jax.errors import UserError
from swav_jax.methods import swav
from swav_jax.parallel import mesh as meshes
from swav_jax.precision import COMPUTE_DTYPES, LossScale
from swav_jax.state import Layout, TrainState


def make_schedule(config: ConfigDict, sizes: settings.Sizes) -> optim.Schedule:
    """The learning rate as a function of the step.

    Raises:
      UserError: a part of the schedule cannot work.
    """
    lr = config.optimizer.param_schedulers.lr
    check_schedule(lr, 'config.optimizer.param_schedulers.lr')
    return optim.learning_rate(
        lr,
        batch_size=sizes.batch_size,
        total_steps=sizes.total_steps,
        steps_per_epoch=sizes.steps_per_epoch,
    )


def make_state(
    config: ConfigDict, sizes: settings.Sizes, schedule: optim.Schedule, mesh: Mesh
) -> tuple[models.SwAVNet, optax.GradientTransformation, Layout, TrainState]:
    """The network, the optimizer, and the state before the first step, with its layout.

    Raises:
      UserError: the settings name no network or no parameter.
    """
    build = functools.partial(
        models.build,
        config.model,
        channels=config.data.channels,
        dtype=COMPUTE_DTYPES[config.precision],
    )
    plain = build()
    crops = [
        jnp.zeros((2, size, size, config.data.channels)) for size in set(config.data.size_crops)
    ]
    frozen = dict(config.model.temp_frozen_params_iter_map)

    def initial(tx=None):
        variables = plain.init(jax.random.key(config.seed), crops, train=True)
        params = variables['params']
        if config.loss.normalize_last_layer:
            params = swav.normalize_prototypes(params)
        queue = None
        if sizes.queue_batches:
            dim = config.model.head.dims[-1]
            queue = swav.Queue.empty(
                len(config.loss.crops_for_assign),
                sizes.queue_batches,
                sizes.batch_size,
                dim,
                jnp.promote_types(COMPUTE_DTYPES[config.precision], jnp.float32),
            )
        return TrainState(
            step=jnp.int32(0),
            params=params,
            batch_stats=variables['batch_stats'],
            opt_state=tx and tx.init(params),
            queue=queue,
            loss_scale=LossScale.initial(config.precision),
        )

    shapes = jax.eval_shape(initial)
    try:
        tx = optim.make_optimizer(config.optimizer, schedule, frozen, shapes.params)
        layout = Layout(mesh, jax.eval_shape(lambda: initial(tx)), config.sharding)
    except ValueError as error:
        raise UserError(f'config.model.temp_frozen_params_iter_map={frozen}: {error}') from error
    state = jax.jit(lambda: layout.pad(initial(tx)), out_shardings=layout.shardings)()
    return build(axis_names=('member',), mesh_axes=meshes.AXES), tx, layout, state


def start_from(config: ConfigDict, layout: Layout, state: TrainState) -> TrainState:
    """The state before the first step with the weights that `config.init_from` names."""
    whole = layout.gather(state)
    params, batch_stats = torch_weights.load_into(
        jax.device_get(whole.params),
        jax.device_get(whole.batch_stats),
        config.init_from,
        allow_partial=config.init_allow_partial,
    )
    if config.loss.normalize_last_layer:
        params = swav.normalize_prototypes(params)
    params, batch_stats = meshes.put(layout.mesh, (params, batch_stats))
    return layout.spread(whole.replace(params=params, batch_stats=batch_stats))
