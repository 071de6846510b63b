"""Speed on this machine.

    python scripts/benchmark.py {input,step,collectives,startup,kmeans,all} [--peer] [--json FILE]

input        images per second of one CPU core, with the boxes of 2×224 + 6×96 crops; --peer: also
             the official SwAV code's PIL and torchvision transforms on the same images
step         a training step of configs/demo.py, of ResNet-50 and RegNetY-400MF (2×224 + 6×96, 4
             images; on a GPU 64, in bfloat16) and ResNet-18 (2×64 + 4×32, 64 images), its parts,
             its largest memory; --peer: PyTorch's twin of the same network (torch_twin.py),
             channels last, on a GPU autocast and compiled
collectives  bytes that a ResNet-50's step sends, and the time of its collectives on these devices
startup      compilation at a first and a second start, and --help
kmeans       DeepCluster-v2's k-means of 20,032 embeddings of 128 into 3,000 clusters, over a plain
             matrix product of the same size, as often

Ours and the peer's run in turn, round after round, so that other work slows them alike; figures are
medians. Each step runs in a process of its own, on all cores that it may use: taskset restricts
them. `ratio_…` is our time (or memory) over the peer's; `micro_batches_…` is the time of a step of
four micro-batches over that of four plain steps of their size.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from swav_jax import cli
from swav_jax.errors import UserError

KINDS = ('input', 'step', 'collectives', 'startup', 'kmeans')


def main(argv: Sequence[str]) -> None:
    """Run what the command line names, print a table."""
    parser = cli.Parser(__doc__)
    parser.add_argument('kind', choices=(*KINDS, 'all'))
    parser.add_argument('--peer', action='store_true', help='also the same in PyTorch')
    parser.add_argument('--json', type=cli.new_file, help='where to write the figures')
    parser.add_argument('--rounds', type=cli.integer(1), default=5, help='of each measurement')
    parser.add_argument('--images', type=cli.path, help='input: a folder (default: generated)')
    parser.add_argument('--batches', type=cli.integer(1), default=500, help='input: of 64 images')
    parser.add_argument('--tasks', nargs='+', help='step: some of demo r50 r18 regnety_400mf')
    args = parser.parse(argv)
    results = run_all(argv) if args.kind == 'all' else run(args)
    for key, value in results.items() if args.kind != 'all' else ():
        print(f'{key:>36}  {value:,.4g}' if isinstance(value, float) else f'{key:>36}  {value}')
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + '\n')


def run(args: argparse.Namespace) -> dict:
    """The figures of one kind."""
    if args.kind == 'input':
        import benchmark_input

        with tempfile.TemporaryDirectory() as folder:
            images = args.images or benchmark_input.write_photos(Path(folder))
            return benchmark_input.measure(images, args.peer, args.batches)
    if args.kind == 'startup':
        import benchmark_startup

        return benchmark_startup.measure(args.rounds)
    if args.kind == 'kmeans':
        import benchmark_kmeans

        return benchmark_kmeans.measure(args.rounds)
    if args.kind == 'collectives':
        import benchmark_collectives

        return benchmark_collectives.measure(args.rounds)
    # Several processes share a GPU.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    import benchmark_step

    tasks = args.tasks or list(benchmark_step.TASKS)
    if unknown := set(tasks) - set(benchmark_step.TASKS):
        known = ', '.join(benchmark_step.TASKS)
        raise UserError(f'--tasks {min(unknown)}: must be some of {known}')
    return benchmark_step.measure(tasks, args.peer, args.rounds)


def run_all(arguments: Sequence[str]) -> dict:
    """Every kind in a process of its own, so that none inherits another's threads or memory."""
    results = {}
    for kind in KINDS:
        print(f'{kind}:', flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / 'figures.json'
            command = [kind if a == 'all' else a for a in arguments] + [f'--json={file}']
            subprocess.run([sys.executable, __file__, *command], check=True, env=os.environ)
            results |= json.loads(file.read_text())
    return results


if __name__ == '__main__':
    sys.exit(cli.run(main, sys.argv[1:]))
