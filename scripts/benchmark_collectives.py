"""What a ResNet-50's step sends between devices, and how long it takes on those that are here."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from swav_jax import config as settings
from swav_jax.commands import plan
from swav_jax.methods import swav
from swav_jax.parallel.mesh import AXES, make_mesh
from swav_jax.state import make_schedule


def measure(rounds: int) -> dict[str, float | int]:
    """Bytes from the traced step; medians in seconds over all devices."""
    config = settings.default()
    mesh = make_mesh(config.model.sync_bn)
    sizes = settings.sizes(config, num_images=1_281_167, num_devices=mesh.size)
    abstract = plan.AbstractMesh(mesh.devices.shape, AXES)
    cost = plan.cost(config, sizes, make_schedule(config, sizes), abstract)
    rows, prototypes = config.data.batchsize_per_replica, config.model.head.num_clusters[0]
    scores = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, rows, prototypes)))
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, out_specs=P())

    def average(x):
        return jax.lax.pmean(x, AXES)

    def sinkhorn(scores, axis_names):
        codes = swav.sinkhorn_codes([scores], epsilon=0.05, num_iters=3, axis_names=axis_names)[0]
        return jnp.sum(codes)

    def vary(x):
        return jax.lax.pcast(x, AXES, to='varying')

    gradients = jnp.ones(cost.num_params, jnp.float32)
    small = jnp.ones((2, 2048), jnp.float32)
    runs = {
        'gradients': (on_mesh(lambda x: average(vary(x)), in_specs=P()), gradients),
        'sinkhorn': (on_mesh(lambda x: average(sinkhorn(vary(x), AXES)), in_specs=P()), scores),
        'sinkhorn_alone': (functools.partial(sinkhorn, axis_names=()), scores),
        'batch_norm_sums': (on_mesh(lambda x: average(vary(x)), in_specs=P()), small),
    }
    found: dict[str, float | int] = {'devices': mesh.size, 'bytes_sent': cost.sent}
    for name, (function, argument) in runs.items():
        compiled, seconds = jax.jit(function), []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            jax.block_until_ready(compiled(argument))
            seconds.append(time.perf_counter() - start)
        found[name] = statistics.median(seconds[1:])
    return found
