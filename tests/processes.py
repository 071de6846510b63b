"""Runs in processes of their own, of a network that compiles in seconds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

TINY = str(ROOT / 'scripts' / 'tiny.py')


def command(workdir, *flags, config=TINY):
    return [
        sys.executable,
        '-m',
        'swav_jax.main',
        f'--config={config}',
        f'--workdir={workdir}',
        *flags,
    ]


def environment(devices=1, **variables):
    """CPU devices, and what other tests compiled."""
    cache = {'JAX_COMPILATION_CACHE_DIR': os.environ['COMPILED_BY_TESTS']}
    return os.environ | cache | variables | {
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(ROOT),
    }  # fmt: skip


def run(workdir, *flags, **kwargs):
    return subprocess.run(
        command(workdir, *flags, **kwargs),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def one_of_two(number, port):
    """Flags of one of two processes that train together."""
    return (f'--coordinator=localhost:{port}', '--num_processes=2', f'--process_id={number}')


def free_port():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]
