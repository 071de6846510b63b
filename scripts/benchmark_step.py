"""A training step from given crops next to PyTorch's, and where its time goes."""

import contextlib
import functools
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import models, step, xla_flags
from swav_jax.commands import plan
from swav_jax.config import trunks
from swav_jax.config.file import load_config
from swav_jax.cpu.host_memory import give_back_freed_memory, keep_freed_memory
from swav_jax.parallel.mesh import AXES, make_mesh
from swav_jax.state import make_schedule, make_state

Figures = dict[str, float | int | str]

# Dense peak in TFLOP/s for bfloat16, from the makers' data sheets.
PEAKS = {'NVIDIA H100 80GB HBM3': 989, 'NVIDIA H200': 989, 'NVIDIA A100-SXM4-80GB': 312}


class Task(NamedTuple):
    """The step of a recipe; on a GPU in bfloat16 and with `gpu_batch` images."""

    config: ConfigDict
    arch: str  # of torchvision, made to fit
    gpu_batch: int


def imagenet(trunk: ConfigDict, batch: int) -> ConfigDict:
    """The ImageNet recipe with another trunk and batch."""
    config = settings.default()
    config.model.trunk = trunk
    config.data.canvas_size = 256
    config.data.batchsize_per_replica = batch
    return config


def small_imagenet() -> ConfigDict:
    """The ImageNet recipe with a ResNet-18 and smaller crops."""
    config = imagenet(trunks.section('resnet', depth=18), 64)
    config.data.canvas_size = 64
    config.data.num_crops, config.data.size_crops = (2, 4), (64, 32)
    return config


KINDS = (
    'step',
    'step_with_augment',
    'step_without_optimizer',
    'network',
    'step_of_a_quarter',
    'step_of_four_quarters',
)
IMAGENET = 1_281_167  # images
DEMO = Path(__file__).parents[1] / 'configs' / 'demo.py'
TASKS = {
    'demo': Task(load_config(str(DEMO)), 'resnet18', 1024),
    'r50': Task(imagenet(trunks.section('resnet', depth=50), 4), 'resnet50', 64),
    'r18': Task(small_imagenet(), 'resnet18', 512),
    'regnety_400mf': Task(imagenet(trunks.section('regnet_y_400mf'), 4), 'regnet_y_400mf', 64),
}


def measure(names: list[str], peer: bool, rounds: int) -> Figures:
    """Figures of each task; times in seconds, memory in MB."""
    found: Figures = {
        'device': device_name(),
        'cores': xla_flags.cores(),
        'rounds': rounds,
    }
    for name in names:
        found |= {f'{key}_{name}': value for key, value in measure_task(name, peer, rounds).items()}
    return found


def device_name() -> str:
    """As its maker calls it."""
    name, cpus = jax.devices()[0].device_kind, Path('/proc/cpuinfo')
    if name != 'cpu' or not cpus.exists():
        return name
    found = re.search(r'model name\s*:\s*(.+)', cpus.read_text())
    return found[1] if found else name


def measure_task(name: str, peer: bool, rounds: int) -> Figures:
    """One task: the step, its parts, and PyTorch's step, one after the other in every round."""
    config = make_config(TASKS[name])
    batch = config.data.batchsize_per_replica
    kinds = [*KINDS, *(['peer'] if peer else [])]
    with contextlib.ExitStack() as stack:
        runs = {kind: stack.enter_context(Child(name, kind)) for kind in kinds}
        seconds = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, run in runs.items():
                seconds[kind].append(run())
        times = {kind: statistics.median(values) for kind, values in seconds.items()}
        memory = {kind: runs[kind].peak_memory for kind in ('step', 'peer') if kind in runs}
    found: Figures = {
        'step': times['step'],
        'images_per_second': batch / times['step'],
        'tflops': flops(config) / times['step'] / 1e12,
        'augment': times['step_with_augment'] - times['step'],
        'optimizer': times['step'] - times['step_without_optimizer'],
        'loss_and_metrics': times['step_without_optimizer'] - times['network'],
        'network': times['network'],
        'micro_batches': times['step_of_four_quarters'] / (4 * times['step_of_a_quarter']),
        'peak_memory': memory['step'],
    }
    if peak := PEAKS.get(jax.devices()[0].device_kind):
        found['share_of_peak'] = found['tflops'] / peak
    if peer:
        found |= {
            'peer_step': times['peer'],
            'ratio': times['step'] / times['peer'],
            'peer_peak_memory': memory['peer'],
            'ratio_memory': memory['step'] / memory['peer'],
        }
    return found


class Child:
    """A process that makes one kind of step whenever it is called, and nothing in between.

    In one process the threads of one framework would still spin while the other's step runs, and
    each would find its memory given back. Entering it builds the step and warms up.

    Attributes:
      peak_memory: in MB, the largest of the steps, without what the imports take. Compilation does
        not count. On a GPU that of the device.
    """

    def __init__(self, name: str, kind: str):
        command = [sys.executable, __file__, name, kind]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process = subprocess.Popen(command, **pipes)
        self.peak_memory = 0.0

    def __enter__(self) -> 'Child':
        self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __call__(self) -> float:
        """Seconds of one step."""
        print('', file=self._process.stdin, flush=True)
        seconds, self.peak_memory = self._read()
        return seconds

    def _read(self) -> tuple[float, float]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f'{self._process.args} ended with {self._process.wait()}')
        return tuple(json.loads(line))


def flops(config: ConfigDict) -> float:
    """Floating-point operations of a step on one device, from the traced step."""
    sizes = settings.sizes(config, num_images=IMAGENET, num_devices=1)
    mesh = plan.AbstractMesh((1, 1), AXES)
    return plan.cost(config, sizes, make_schedule(config, sizes), mesh).flops


def make_config(task: Task) -> ConfigDict:
    """The settings of a task on this machine."""
    config = task.config.copy_and_resolve_references()
    if jax.default_backend() != 'cpu':
        config.data.batchsize_per_replica = task.gpu_batch
        config.precision = 'bfloat16'
    return config


class Run:
    """Calls a compiled function again and again, its state donated, and waits for the result."""

    def __init__(self, function: Callable, state: object, *args: object):
        self._function = jax.jit(function, donate_argnums=0)
        self._state, self._args = state, args

    def __call__(self) -> None:
        """Once."""
        self._state, out = self._function(self._state, *self._args)
        jax.block_until_ready(out)


def our_run(config: ConfigDict, kind: str) -> Run:
    """The step from crops, or one with or without some part: `kind` is one of `KINDS`.

    A quarter is a step of a quarter of the batch, four quarters are its micro-batches.
    """
    if 'quarter' in kind:
        config.data.batchsize_per_replica //= 4
    if kind == 'step_of_four_quarters':
        config.train.micro_batches = 4
    mesh = make_mesh(config.model.sync_bn, jax.devices()[:1])
    sizes = settings.sizes(config, num_images=IMAGENET, num_devices=1)
    schedule = make_schedule(config, sizes)
    net, tx, layout, _ = make_state(config, sizes, schedule, mesh)
    rng = np.random.default_rng(0)
    rows, side, channels = sizes.batch_size, config.data.canvas_size, config.data.channels
    num_crops = sum(config.data.num_crops)
    crops = [
        jnp.asarray(rng.standard_normal((n, rows, size, size, channels), np.float32))
        for n, size in zip(config.data.num_crops, config.data.size_crops, strict=True)
    ]
    weights = jnp.ones(rows)
    images = {
        'image': rng.integers(0, 256, (rows, side, side, channels), np.uint8),
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
        return update(state, batch, batch['weight'])

    # It has the same state and moves nothing.
    still = optax.GradientTransformation(tx.init, lambda g, s, p: (optax.tree.zeros_like(g), s))

    plain = models.build(config.model, channels=channels, dtype=jnp.dtype(config.precision))

    def network(state, crops):
        """Forward and backward pass, and nothing that makes use of them."""

        def objective(params):
            (embeddings, scores), batch_stats = step.forward(
                plain, config, params, state.batch_stats, crops
            )
            return sum(s.mean() for s in scores) + embeddings.mean(), batch_stats

        grads, batch_stats = jax.grad(objective, has_aux=True)(state.params)
        return state.replace(batch_stats=batch_stats), optax.tree.norm(grads)

    if kind == 'step_with_augment':
        return Run(with_augment, fresh(), images)
    if kind == 'network':
        return Run(network, fresh(), crops)
    without = kind == 'step_without_optimizer'
    function = functools.partial(update, tx=still) if without else update
    return Run(function, fresh(), crops, weights)


def peer_run(task: Task, config: ConfigDict) -> Callable[[], None]:
    """The same step in PyTorch: channels last; on a GPU autocast to bfloat16, and compiled."""
    import torch
    from torch_twin import make_twin, twin_loss, twin_tensors, twin_update

    on_gpu = jax.default_backend() == 'gpu'
    device = 'cuda' if on_gpu else 'cpu'
    if not on_gpu:
        torch.set_num_threads(xla_flags.cores())
    rows, channels = config.data.batchsize_per_replica, config.data.channels
    net = models.build(config.model, channels=channels)
    example = [jnp.zeros((2, size, size, channels)) for size in config.data.size_crops]
    # Traced, because compiling our initialization would count as memory of PyTorch's step.
    ours = jax.eval_shape(lambda: net.init(jax.random.key(0), example, train=True))
    ours = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), ours)
    twin = make_twin(task.arch, twin_tensors(ours, net.trunk))
    twin = twin.to(device, memory_format=torch.channels_last)
    network = torch.compile(twin) if on_gpu else twin
    # `memory_format` would leave the strides of a single channel as they are.
    crops = [
        torch.randn(n * rows, size, size, channels, device=device).movedim(-1, 1)
        for n, size in zip(config.data.num_crops, config.data.size_crops, strict=True)
    ]
    # The prototypes stay frozen, like in our first steps.
    if config.optimizer.name == 'adamw':
        learned = [p for p in twin.parameters() if p is not twin.prototypes.weight]
        optimizer = torch.optim.AdamW(
            learned,
            lr=0.001,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        update = optimizer.step
    else:
        frozen = {'prototypes.weight'}
        update = functools.partial(twin_update, twin, {}, 0.1, config.optimizer, frozen)

    def run():
        twin.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            scores = network(crops)
        loss = config.loss
        twin_loss(scores.float(), rows, loss.epsilon, loss.temperature, loss.num_iters).backward()
        update()
        twin.normalize_prototypes()
        if on_gpu:
            torch.cuda.synchronize()

    return run


def resident(*, largest: bool = False) -> float:
    """Memory of this process in MB, or the largest since `forget_largest`; nan without /proc."""
    status = Path('/proc/self/status')
    name = 'VmHWM' if largest else 'VmRSS'
    found = status.is_file() and re.search(rf'{name}:\s*(\d+) kB', status.read_text())
    return int(found[1]) * 1024 / 1e6 if found else math.nan


def forget_largest() -> None:
    """Reset the largest memory (clear_refs in proc(5))."""
    if (file := Path('/proc/self/clear_refs')).exists():
        file.write_text('5')


def main(name: str, kind: str) -> None:
    """The process of a `Child`."""
    if kind == 'peer':
        import torch  # before the first look at the memory
    else:
        xla_flags.set_defaults()  # as swav_jax.main does, and with it
        keep_freed_memory()
    config, before = make_config(TASKS[name]), resident()
    run = peer_run(TASKS[name], config) if kind == 'peer' else our_run(config, kind)
    run()
    if kind != 'peer':
        give_back_freed_memory()  # as swav_jax.training does
    run()
    forget_largest()
    print(json.dumps([0, 0]), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        if jax.default_backend() == 'cpu':
            memory = resident(largest=True) - before
        elif kind == 'peer':
            memory = torch.cuda.max_memory_allocated() / 1e6
        else:
            memory = jax.devices()[0].memory_stats()['peak_bytes_in_use'] / 1e6
        print(json.dumps([seconds, memory]), flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
