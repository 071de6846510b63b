"""Flags of XLA on GPUs and CPUs, and the cache of compiled programs; before the first step."""

import os
from pathlib import Path

import jax

# GPUs: all-reduces of gradients run during the backward pass instead of after it.
GPU_FLAGS = ('--xla_gpu_enable_latency_hiding_scheduler=true',)

# CPUs: a step frees memory before it allocates more, and needs little more than half as much.
CPU_FLAGS = ('--xla_cpu_enable_concurrency_optimized_scheduler=false',)


def set_defaults() -> None:
    """Keep compiled programs between runs, and set the flags that matter.

    JAX_COMPILATION_CACHE_DIR names another folder than ~/.cache/swav_jax/xla ('' keeps nothing). A
    flag that XLA_FLAGS names already stays as it is.

    On the CPU each number of cores has its own folder in it. XLA divides work among the cores when
    it compiles, but JAX's key of the cache does not contain their number: compiled with one core,
    the step of a RegNet takes a sixth longer on two.

    On a single CPU device a step runs when it is called. A step that is queued behind another one
    would allocate its scratch memory while the other still holds its own: two to five times the
    memory, without gaining time.
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'swav_jax' / 'xla'
    on_gpu = Path('/dev/nvidiactl').exists()
    folder = cache if on_gpu else cache / f'{cores()}_cores'
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', str(folder))
    flags = os.environ.get('XLA_FLAGS', '')
    ours = GPU_FLAGS if on_gpu else CPU_FLAGS
    missing = [flag for flag in ours if flag.partition('=')[0] not in flags]
    os.environ['XLA_FLAGS'] = ' '.join([flags, *missing]).strip()
    if not on_gpu:
        jax.config.update('jax_cpu_enable_async_dispatch', False)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
