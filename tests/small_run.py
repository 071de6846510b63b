"""A run's folder with a network of a single block, as three steps of training would leave it."""

import contextlib

import jax
import numpy as np
from processes import TINY

from swav_jax import cli, models
from swav_jax import config as settings
from swav_jax.runs.checkpoint import Checkpoints


def random_variables(net, size, channels):
    """Variables of a network; to compile the real initialisation takes longer than most tests."""
    crops = [np.zeros((2, size, size, channels), np.float32)]
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), crops, train=True))
    rng = np.random.default_rng(0)

    def fill(path, x):
        values = rng.standard_normal(x.shape) / np.sqrt(max(x.size // x.shape[-1], 1))
        return np.float32(1 + abs(values) if path[-1].key in ('var', 'scale') else values)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def write_run(workdir):
    """Write the checkpoint; returns the run's settings and its variables."""
    config = cli.load_config(TINY)
    net = models.build(config.model, channels=config.data.channels)
    crops = [np.zeros((2, 16, 16, config.data.channels), np.float32)]
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), crops, train=True))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: np.float32(rng.uniform(0.1, 1, x.shape)), dict(shapes))
    workdir.mkdir()
    with contextlib.closing(Checkpoints(workdir / 'checkpoints')) as checkpoints:
        checkpoints.save(3, jax.device_put(state), {'config': settings.to_dict(config)})
    return config, state
