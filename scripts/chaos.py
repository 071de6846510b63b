"""Kill a run again and again, and show that nothing is lost.

    python scripts/chaos.py --kills 20

A small run (queue, float16 with its loss scale) is killed with SIGKILL at random moments: while it
starts, between steps, and while it writes a checkpoint. It is started again each time, and in the
end compared with a run that nobody killed. Exit code 0 if all of this held:

- each start resumed from the newest checkpoint, so none failed to load and no step before it was
  lost;
- every step is on record once, with a loss that is the same to the last bit;
- the last state is the same to the last bit.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from swav_jax import cli
from swav_jax.runs.checkpoint import Checkpoints
from swav_jax.runs.monitor import read_rows

ROOT = Path(__file__).parent.parent
STEPS_A_KILL = 120
PLACES = ('at the start', 'between steps', 'in a checkpoint')


def command(workdir: Path, kills: int) -> list[str]:
    """The run of tiny.py with a queue, float16 and a checkpoint every 5 steps."""
    settings = {
        'data.limit': 40,
        'loss.queue.queue_length': 16,
        'precision': 'float16',
        'optimizer.num_epochs': STEPS_A_KILL * (kills + 1) // 10,
        'checkpoint.every_epochs': 0,
        'checkpoint.every_steps': 5,
    }
    flags = [f'--config.{name}={value}' for name, value in settings.items()]
    return [sys.executable, '-m', 'swav_jax.main', '--config=scripts/tiny.py',
            f'--workdir={workdir}', *flags]  # fmt: skip


def start(workdir: Path, kills: int, log: Path) -> subprocess.Popen:
    """Start or resume a run, in a process group of its own."""
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'compiled'),
        'XLA_FLAGS': '',
        'PYTHONPATH': str(ROOT),
    }
    with log.open('w') as file:
        return subprocess.Popen(
            command(workdir, kills),
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def newest(workdir: Path) -> int:
    """Step of the newest checkpoint that has its final name; 0 without any."""
    return max((int(p.name) for p in (workdir / 'checkpoints').glob('[0-9]*') if p.name.isdigit()),
               default=0)  # fmt: skip


def wait_for(place: str, run: subprocess.Popen, folder: Path, log: Path, target: int) -> None:
    """Wait until the run is where it shall be killed, or has ended.

    Args:
      place: one of `PLACES`.
      run: the process.
      folder: its workdir.
      log: what it printed.
      target: steps that shall be made before, unless it is killed at the start.
    """
    if place == 'at the start':
        time.sleep(random.uniform(0, 10))
        return
    # A start drops the rows after its checkpoint before it prints its introduction.
    while run.poll() is None and ('an epoch' not in log.read_text() or len(rows(folder)) < target):
        time.sleep(0.05)
    if place == 'in a checkpoint':
        writing = folder / 'checkpoints'
        while run.poll() is None and not any(writing.glob('*.orbax-checkpoint-tmp*')):
            pass


def rows(workdir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, loss scale) of every row."""
    return [
        (row['step'], row['loss'], row['loss_scale'])
        for row in read_rows(workdir / 'metrics.jsonl')
    ]


def digests(workdir: Path) -> dict[str, dict]:
    """Digests of the last state, as they are on disk."""
    checkpoints = Checkpoints(workdir / 'checkpoints')
    found = checkpoints.arrays(newest(workdir))
    checkpoints.close()
    return found


def chaos(folder: Path, kills: int, seed: int) -> None:
    """Kill and resume a run, and compare it with one that nobody killed.

    Raises:
      AssertionError: something was lost.
    """
    random.seed(seed)
    whole, killed, log = folder / 'whole', folder / 'killed', folder / 'log'
    assert start(whole, kills, log).wait() == 0, log.read_text()
    print(f'unbroken: {rows(whole)[-1][0]} steps', flush=True)

    saved = 0
    for number in range(kills + 1):
        run = start(killed, kills, log)
        place = PLACES[number % len(PLACES)]
        if number < kills:
            wait_for(place, run, killed, log, saved + random.randint(1, STEPS_A_KILL // 2))
            assert run.poll() is None, f'it ended before kill {number + 1}:\n{log.read_text()}'
            os.killpg(run.pid, signal.SIGKILL)
        code = run.wait()
        text = log.read_text()
        assert 'damaged' not in text and 'Traceback' not in text, text
        found = re.search('resuming from step ([0-9,]+)', text)
        began = int(found[1].replace(',', '')) if found else 0
        if found or number == kills:
            assert began == saved, f'it resumed from {began}, not from checkpoint {saved}:\n{text}'
        assert newest(killed) >= saved, 'a checkpoint is gone'
        saved = newest(killed)
        what = f'kill {number + 1:2}, {place}' if number < kills else f'ended with {code}'
        print(f'{what}: began at step {began}, newest checkpoint {saved}', flush=True)
    assert code == 0, text

    expected, found = rows(whole), rows(killed)
    assert found == expected, 'steps, losses or loss scales differ'
    assert digests(killed) == digests(whole), 'the last states differ'
    print(f'{kills} kills; {len(found)} losses and {len(digests(whole))} arrays identical')


def main(argv: Sequence[str]) -> None:
    """Parse the flags and run."""
    parser = cli.Parser(__doc__)
    parser.add_argument('--kills', type=cli.integer(), default=20)
    parser.add_argument('--seed', type=cli.integer(), default=0, help='of the random moments')
    found = parser.parse(argv)
    with tempfile.TemporaryDirectory() as temporary:
        chaos(Path(temporary), found.kills, found.seed)


if __name__ == '__main__':
    sys.exit(cli.run(main, sys.argv[1:]))
