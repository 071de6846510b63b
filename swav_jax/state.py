"""The state of a run, and the one that it starts from."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import methods, models, optim
from swav_jax.config.schedules import Schedule
from swav_jax.errors import UserError
from swav_jax.parallel import mesh as meshes
from swav_jax.parallel.layout import Layout
from swav_jax.precision import LossScale, need_float64


@flax.struct.dataclass
class TrainState:
    """What a step reads and writes; float32 whatever the compute dtype, float64 with float64."""

    step: jax.Array  # () int32, steps done
    failed: jax.Array  # () bool, whether a step was not finite; later ones change nothing
    params: Any
    batch_stats: Any
    opt_state: Any
    method: Any  # the method's state, see `methods.method.Method`
    loss_scale: LossScale | None

    def variables(self, encoder: str) -> dict[str, Any]:
        """`params` and `batch_stats` of the network, or of the method's 'momentum' encoder."""
        of = self.method if encoder == 'momentum' else self
        return {'params': of.params, 'batch_stats': of.batch_stats}


def make_schedule(config: ConfigDict, sizes: settings.Sizes) -> optim.Schedule:
    """Return the learning rate as a function of the step.

    Raises:
      UserError: a part of the schedule cannot work.
    """
    lr = config.optimizer.param_schedulers.lr
    Schedule().check('config.optimizer.param_schedulers.lr', lr)
    return optim.learning_rate(
        lr,
        batch_size=sizes.batch_size,
        total_steps=sizes.total_steps,
        steps_per_epoch=sizes.steps_per_epoch,
    )


def make_state(
    config: ConfigDict, sizes: settings.Sizes, schedule: optim.Schedule, mesh: Mesh
) -> tuple[models.SwAVNet, optax.GradientTransformation, Layout, TrainState]:
    """Return the network, the optimizer, the layout, and the state before the first step.

    Raises:
      UserError: the settings name no network or no parameter, do not go with the size of the batch,
        or ask for float64 where JAX would quietly compute in float32.
    """
    build = functools.partial(
        models.build,
        config.model,
        channels=config.data.channels,
        dtype=jnp.dtype(config.precision),
    )
    plain = build()
    crops = [
        jnp.zeros((2, size, size, config.data.channels)) for size in set(config.data.size_crops)
    ]
    method, frozen = methods.make(config), dict(config.model.temp_frozen_params_iter_map)
    method.check_run(sizes)
    if config.precision == 'float64':
        need_float64('precision')

    def initial(tx=None):
        variables = plain.init(jax.random.key(config.seed), crops, train=True)
        batch_stats = variables.get('batch_stats', {})
        params, own = method.init(variables['params'], batch_stats, sizes)
        return TrainState(
            step=jnp.int32(0),
            failed=jnp.array(False),
            params=params,
            batch_stats=batch_stats,
            opt_state=tx and tx.init(params),
            method=own,
            loss_scale=LossScale.initial(config.precision),
        )

    shapes = jax.eval_shape(initial)
    try:
        tx = optim.make_optimizer(config.optimizer, schedule, frozen, shapes.params)
        whole = jax.eval_shape(lambda: initial(tx))
        layout = Layout(
            mesh, whole, config.sharding, method.specs(whole.method), config.train.micro_batches
        )
    except ValueError as error:
        raise UserError(f'config.model.temp_frozen_params_iter_map={frozen}: {error}') from error
    state = jax.jit(lambda: layout.pad(initial(tx)), out_shardings=layout.shardings)()
    return build(axis_names=('member',), mesh_axes=meshes.AXES), tx, layout, state
