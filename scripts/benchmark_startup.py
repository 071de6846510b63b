"""Seconds of compilation at a first start, and at a second one that finds the first one's."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What a run compiles before its first step, without the rest of it.
COMPILE = """
import time
from swav_jax import config as settings, main
from swav_jax.commands import traced
from swav_jax.parallel.mesh import make_mesh
from swav_jax.state import make_schedule, make_state
from swav_jax.step import make_train_step

config = main.parse(['--config=configs/demo.py']).config
mesh = make_mesh(config.model.sync_bn)
sizes = settings.sizes(config, num_images=10_000, num_devices=mesh.size)
net, tx, layout, state = make_state(config, sizes, make_schedule(config, sizes), mesh)
step = make_train_step(net, tx, config, layout)
lowered = step.lower(state, traced.batch_shapes(config, sizes.batch_size))
start = time.perf_counter()
lowered.compile()
print(time.perf_counter() - start)
"""


def measure(rounds: int) -> dict[str, float]:
    """Medians; `ratio_second_compilation` is the second start's over the first's."""
    firsts, seconds, helps = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            firsts.append(float(python(cache, '-c', COMPILE)))
            seconds.append(float(python(cache, '-c', COMPILE)))
            start = time.perf_counter()
            python(cache, '-m', 'swav_jax.main', '--help')
            helps.append(time.perf_counter() - start)
    first, second = statistics.median(firsts), statistics.median(seconds)
    return {
        'first_compilation': first,
        'second_compilation': second,
        'ratio_second_compilation': second / first,
        'help': statistics.median(helps),
    }


def python(cache: str, *arguments: str) -> str:
    """What a Python process prints whose compilations are kept in `cache`."""
    env = os.environ | {'JAX_COMPILATION_CACHE_DIR': cache, 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout
