"""How XLA compiles and runs; to be set before the first computation."""

import os
from pathlib import Path

import jax

# All-reduces of gradients run beside the backward pass instead of after it.
GPU_FLAGS = ('--xla_gpu_enable_latency_hiding_scheduler=true',)

# A step frees what it can before it goes on, and takes little more than half of the memory.
CPU_FLAGS = ('--xla_cpu_enable_concurrency_optimized_scheduler=false',)


def set_defaults() -> None:
    """Keep compiled programs between runs, and set the flags that matter.

    JAX_COMPILATION_CACHE_DIR names another folder than ~/.cache/swav_jax/xla ('' keeps nothing). A
    flag that XLA_FLAGS names already stays as it is.

    On the CPU each number of cores has a folder of its own in it. XLA shares work out among the
    cores when it compiles, and JAX would not notice: compiled with one core, a RegNet's step takes
    a sixth longer on two.

    And a step on one CPU device is made when it is called. Queued behind another, its scratch would
    be taken while the other still holds its own: two to five times the memory, and no time won.
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
