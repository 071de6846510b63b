"""A training step from given crops, beside PyTorch's, and where its time goes."""

import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import models, step, traced
from swav_jax.initial_state import make_schedule, make_state
from swav_jax.mesh import make_mesh
from swav_jax.precision import COMPUTE_DTYPES

Figures = dict[str, float | int | str]

# Dense peak in TFLOP/s for bfloat16, from the makers' data sheets.
PEAKS = {'NVIDIA H100 80GB HBM3': 989, 'NVIDIA H200': 989, 'NVIDIA A100-SXM4-80GB': 312}


class Task(NamedTuple):
    """A network and its crops; `batch` images on a CPU, `gpu_batch` on a GPU."""

    arch: str
    trunk: dict
    crops: tuple[tuple[int, int], ...]  # (number, size)
    batch: int
    gpu_batch: int


LARGE = ((2, 224), (6, 96))
TASKS = {
    'r50': Task('resnet50', dict(depth=50), LARGE, 4, 64),
    'r18': Task('resnet18', dict(depth=18), ((2, 64), (4, 32)), 64, 512),
    'regnety_400mf': Task('regnet_y_400mf', dict(name='regnet_y_400mf'), LARGE, 4, 64),
}


def measure(names: list[str], peer: bool, rounds: int) -> Figures:
    """Figures of each task; times in seconds, memory in MB."""
    found: Figures = {
        'device': jax.devices()[0].device_kind,
        'cores': len(os.sched_getaffinity(0))
        if hasattr(os, 'sched_getaffinity')
        else os.cpu_count(),
        'rounds': rounds,
    }
    for name in names:
        found |= {f'{key}_{name}': value for key, value in measure_task(name, peer, rounds).items()}
    return found


def measure_task(name: str, peer: bool, rounds: int) -> Figures:
    """One task: the step, its parts, and PyTorch's step, one after the other in every round."""
    config = make_config(TASKS[name])
    batch = config.data.batchsize_per_replica
    runs = our_runs(config)
    if peer:
        runs['peer'] = peer_run(TASKS[name], config)
    times = in_turn(runs, rounds)
    found: Figures = {
        'step': times['step'],
        'images_per_second': batch / times['step'],
        'tflops': runs['step'].flops / times['step'] / 1e12,
        'augment': times['step_with_augment'] - times['step'],
        'optimizer': times['step'] - times['step_without_optimizer'],
        'loss_and_metrics': times['step_without_optimizer'] - times['network'],
        'network': times['network'],
    }
    if peak := PEAKS.get(jax.devices()[0].device_kind):
        found['share_of_peak'] = found['tflops'] / peak
    if peer:
        found |= {'peer_step': times['peer'], 'ratio': times['step'] / times['peer']}
    if jax.default_backend() == 'cpu':
        found['peak_memory'] = peak_memory(name, 'ours')
        if peer:
            found['peer_peak_memory'] = peak_memory(name, 'peer')
            found['ratio_memory'] = found['peak_memory'] / found['peer_peak_memory']
    return found


def in_turn(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each; all run in every round, so that other work slows them alike."""
    for run in runs.values():
        run()
        run()
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def make_config(task: Task) -> ConfigDict:
    """The ImageNet recipe for a task, in bfloat16 on a GPU."""
    config = settings.default()
    config.model.trunk.update(task.trunk)
    config.data.num_crops, config.data.size_crops = zip(*task.crops, strict=True)
    on_cpu = jax.default_backend() == 'cpu'
    config.data.batchsize_per_replica = task.batch if on_cpu else task.gpu_batch
    config.data.canvas_size = 256 if task.crops == LARGE else 64
    config.precision = 'float32' if on_cpu else 'bfloat16'
    return config


class Run:
    """Calls a compiled function again and again, its state donated, and waits for the result."""

    def __init__(self, function: Callable, state: object, *args: object):
        self.flops = traced.cost(function, state, *args)['flops']
        self._function = jax.jit(function, donate_argnums=0)
        self._state, self._args = state, args

    def __call__(self) -> None:
        """Once."""
        self._state, out = self._function(self._state, *self._args)
        jax.block_until_ready(out)


def our_runs(config: ConfigDict, parts: bool = True) -> dict[str, Callable[[], None]]:
    """The step from crops and, with `parts`, the same with and without some of them."""
    mesh = make_mesh(config.model.sync_bn, jax.devices()[:1])
    sizes = settings.sizes(config, num_images=1_281_167, num_replicas=1)
    schedule = make_schedule(config, sizes)
    net, tx, layout, _ = make_state(config, sizes, schedule, mesh)
    rng = np.random.default_rng(0)
    rows, side = sizes.batch_size, config.data.canvas_size
    num_crops = sum(config.data.num_crops)
    crops = [
        jnp.asarray(rng.standard_normal((n, rows, size, size, 3), np.float32))
        for n, size in zip(config.data.num_crops, config.data.size_crops, strict=True)
    ]
    weights = jnp.ones(rows)
    images = {
        'image': rng.integers(0, 256, (rows, side, side, 3), np.uint8),
        'size': np.full((rows, 2), side, np.int32),
        'boxes': np.tile(np.float32([0, 0, side / 2, side / 2]), (rows, num_crops, 1)),
        'weight': np.ones(rows, np.float32),
        **{name: np.arange(rows, dtype=np.int32) for name in ('epoch', 'position', 'index')},
    }
    images = jax.device_put(images)

    def fresh():
        return make_state(config, sizes, schedule, mesh)[-1]

    def update(state, crops, weights, tx=tx):
        return step.update(net, tx, config, layout, state, crops, weights)

    def with_augment(state, batch):
        return update(state, step.multi_crop(config, mesh, batch), batch['weight'])

    # It has the same state and moves nothing.
    still = optax.GradientTransformation(tx.init, lambda g, s, p: (optax.tree.zeros_like(g), s))

    plain = models.build(config.model, dtype=COMPUTE_DTYPES[config.precision])

    def network(state, crops):
        """Forward and backward pass, and nothing that makes use of them."""

        def objective(params):
            (embeddings, scores), new = step.forward(
                plain, config, params, state.batch_stats, crops
            )
            return sum(s.mean() for s in scores) + embeddings.mean(), new['batch_stats']

        grads, batch_stats = jax.grad(objective, has_aux=True)(state.params)
        return state.replace(batch_stats=batch_stats), optax.tree.norm(grads)

    runs = {'step': Run(update, fresh(), crops, weights)}
    if parts:
        without = functools.partial(update, tx=still)
        runs |= {
            'step_with_augment': Run(with_augment, fresh(), images),
            'step_without_optimizer': Run(without, fresh(), crops, weights),
            'network': Run(network, fresh(), crops),
        }
    return runs


def peer_run(task: Task, config: ConfigDict) -> Callable[[], None]:
    """The same step in PyTorch: channels last; on a GPU autocast to bfloat16, and compiled."""
    import torch
    from torch_twin import Twin, twin_loss, twin_update

    on_gpu = jax.default_backend() == 'gpu'
    device = 'cuda' if on_gpu else 'cpu'
    if not on_gpu:
        torch.set_num_threads(cores())
    _, hidden, dim = config.model.head.dims
    width = models.trunk_output_dim(config.model.trunk)
    twin = Twin(task.arch, width, hidden, dim, config.model.head.num_clusters[0])
    twin = twin.to(device, memory_format=torch.channels_last)
    network = torch.compile(twin) if on_gpu else twin
    rows = config.data.batchsize_per_replica
    crops = [
        torch.randn(n * rows, 3, size, size, device=device).to(memory_format=torch.channels_last)
        for n, size in task.crops
    ]
    buffers = {}

    def run():
        twin.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            scores = network(crops)
        loss = config.loss
        twin_loss(scores.float(), rows, loss.epsilon, loss.temperature, loss.num_iters).backward()
        twin_update(twin, buffers, 0.1, config.optimizer, frozen={'prototypes.weight'})
        twin.normalize_prototypes()
        if on_gpu:
            torch.cuda.synchronize()

    return run


def peak_memory(name: str, whose: str) -> float:
    """Largest memory in MB of a process that makes three steps, beyond its imports."""
    command = [sys.executable, __file__, name, whose]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def resident() -> float:
    """Largest memory of this process so far, in MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1e6 if sys.platform == 'darwin' else used * 1024 / 1e6


def main(name: str, whose: str) -> None:
    """The child of `peak_memory`."""
    task = TASKS[name]
    config = make_config(task)
    if whose == 'peer':
        import torch  # noqa: F401 (before the first look at the memory)

    before = resident()
    run = peer_run(task, config) if whose == 'peer' else our_runs(config, parts=False)['step']
    for _ in range(3):
        run()
    print(json.dumps(resident() - before))


if __name__ == '__main__':
    main(*sys.argv[1:])
