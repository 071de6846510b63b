"""Start N processes on this machine that are one run.

    python scripts/launch_local.py 2 --config configs/demo.py --workdir runs/two

What follows the number is the command line of swav_jax.main. The GPUs of the machine are shared out
evenly among the processes; without GPUs each has --cpu_devices (default 1) virtual CPU devices.
Prints the output of process 0 and the errors of all. When a process fails, the others end within a
minute; Ctrl-C and SIGTERM go to all of them. The exit code is that of the first one that failed.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE = 45  # seconds in which the others may end by themselves when one has failed


def main(argv: Sequence[str]) -> int:
    """Start the processes and wait for them; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s N [--cpu_devices D] FLAGS_OF_MAIN…',
    )
    parser.add_argument('count', type=int, metavar='N', help='number of processes')
    parser.add_argument('--cpu_devices', type=int, default=1, metavar='D', help='of each process')
    args, flags = parser.parse_known_args(argv)
    gpus = visible_gpus()
    if args.count < 1 or args.cpu_devices < 1:
        parser.error('N and --cpu_devices must be 1 or more')
    if gpus and len(gpus) % args.count:
        parser.error(f'{args.count} processes cannot share {len(gpus)} GPUs evenly')

    coordinator = f'localhost:{free_port()}'
    processes = []
    for number in range(args.count):
        command = [sys.executable, '-m', 'swav_jax.main', *flags, f'--coordinator={coordinator}']
        command += [f'--num_processes={args.count}', f'--process_id={number}']
        env = environment(number, args, gpus)
        stdout = None if number == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=env, stdout=stdout))

    def forward(signum, frame):
        for process in processes:
            process.send_signal(signum)

    # A terminal sends Ctrl-C to all of them itself; this one waits for them.
    signal.signal(signal.SIGINT, lambda signum, frame: None)
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, forward)
    return wait(processes)


def wait(processes: list[subprocess.Popen]) -> int:
    """Wait for all; after a failure, no longer than `GRACE`. Returns the first failure's code."""
    failed, deadline = None, None
    while any(process.poll() is None for process in processes):
        if failed is None:
            failed = first_failed(processes)
            deadline = failed is not None and time.monotonic() + GRACE
        if deadline and time.monotonic() > deadline:
            left = [i for i, process in enumerate(processes) if process.poll() is None]
            print(
                f'error: process {failed} {how_it_ended(processes[failed].returncode)}: ending '
                f'process {", ".join(map(str, left))}, which did not within {GRACE} seconds',
                file=sys.stderr,
            )
            for number in left:
                processes[number].kill()
            deadline = None
        time.sleep(0.1)
    failed = first_failed(processes) if failed is None else failed
    code = 0 if failed is None else processes[failed].returncode
    return code if code >= 0 else 128 - code  # a shell's code for a signal


def first_failed(processes: list[subprocess.Popen]) -> int | None:
    """The first process that failed."""
    return next((i for i, process in enumerate(processes) if process.poll()), None)


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f'has ended with code {code}'
    return f'was ended by {signal.Signals(-code).name}'


def environment(number: int, args: argparse.Namespace, gpus: list[str]) -> dict[str, str]:
    """The environment of a process: its share of the devices."""
    if gpus:
        share = len(gpus) // args.count
        mine = gpus[number * share : (number + 1) * share]
        return os.environ | {'CUDA_VISIBLE_DEVICES': ','.join(mine)}
    flag = f'--xla_force_host_platform_device_count={args.cpu_devices}'
    return os.environ | {'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()}


def visible_gpus() -> list[str]:
    """The GPUs that JAX would use, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get('JAX_PLATFORMS', '') == 'cpu' or not shutil.which('nvidia-smi'):
        return []
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return [name for name in os.environ['CUDA_VISIBLE_DEVICES'].split(',') if name]
    listing = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True, check=False)
    return [str(i) for i in range(listing.stdout.count('GPU '))]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
