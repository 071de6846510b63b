"""What a method sees of the images before the first step."""

import jax
import jax.numpy as jnp
import numpy as np

from swav_jax import methods
from swav_jax.parallel import distributed
from swav_jax.parallel import mesh as meshes
from swav_jax.runs.monitor import Monitor
from swav_jax.step import make_fill
from swav_jax.training.progress import Progress
from swav_jax.training.setup import Setup


def fill(setup: Setup, monitor: Monitor, run: Progress) -> None:
    """Show the method an epoch of images if it wants one, in an order and with crops of its own.

    They are those of the epoch after the last. A run that is stopped here begins with this again.

    Raises:
      StoppedError: a signal came.
    """
    sizes = setup.sizes
    if not methods.make(setup.config).fills:
        return
    monitor.say(f'filling the memory bank from {sizes.steps_per_epoch:,} batches')
    see = make_fill(setup.net, setup.config, setup.layout)
    state = jax.tree.map(jnp.copy, run.state)  # a run that is stopped saves its beginning
    batches = setup.batches(sizes.total_steps)
    for number in range(sizes.steps_per_epoch):
        batch = meshes.put_batch(setup.mesh, next(batches))
        if request := distributed.largest(run.wanted()):
            run.stop(0, request)
        state = see(state, np.int32(number), batch, batch['weight'], batch['index'])
        jax.block_until_ready(state.step)  # the host reads faster, and each batch takes memory
    jax.tree.map(lambda x: x.delete(), run.state)  # `setup` holds it to the end
    run.state = state
