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
    """
    cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'swav_jax' / 'xla'
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache))
    flags = os.environ.get('XLA_FLAGS', '')
    ours = GPU_FLAGS if Path('/dev/nvidiactl').exists() else CPU_FLAGS
    missing = [flag for flag in ours if flag.partition('=')[0] not in flags]
    os.environ['XLA_FLAGS'] = ' '.join([flags, *missing]).strip()
