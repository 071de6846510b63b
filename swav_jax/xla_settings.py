"""How XLA compiles; to be set before JAX is imported, and overridden by the environment."""

import os
from pathlib import Path

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
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'swav_jax' / 'xla'
    on_gpu = Path('/dev/nvidiactl').exists()
    folder = cache if on_gpu else cache / f'{cores()}_cores'
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder))
    flags = os.environ.get('XLA_FLAGS', '')
    ours = GPU_FLAGS if on_gpu else CPU_FLAGS
    missing = [flag for flag in ours if flag.partition('=')[0] not in flags]
    os.environ['XLA_FLAGS'] = ' '.join([flags, *missing]).strip()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
