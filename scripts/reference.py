r"""Write the reference curves of a recipe, which reports compare runs with.

    python scripts/reference.py demo
    python scripts/reference.py small_images --config configs/small_images.py:cpu \
        --config.data.source=demo --config.evaluate.train_source=demo \
        --config.evaluate.test_source=demo:test

trains the recipe once for each seed, one run after the other, with an evaluation after each epoch,
and writes swav_jax/evaluate/reference/demo.json: the lowest, median and highest value of each curve
at each epoch. It prints the final figures as a table in Markdown. Run it again to resume: finished
runs are used again.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
from ml_collections import ConfigDict

import swav_jax
from swav_jax import cli, files
from swav_jax import config as settings
from swav_jax.config.file import Changes
from swav_jax.errors import UserError, printable
from swav_jax.evaluate import reference
from swav_jax.runs.rows import read_rows

ROOT = Path(__file__).parent.parent
SEEDS = [0, 1, 2, 3, 4]
# An evaluation after each epoch, and no page.
CHANGES = {'evaluate.every_epochs': 1, 'evaluate.report': False, 'checkpoint.keep': 1}


def main(argv: Sequence[str]) -> None:
    """Train, and write the file."""
    parser = cli.Parser(__doc__)
    parser.accept_changes()
    parser.add_argument('name', metavar='NAME', help='name of the recipe (config.recipe)')
    parser.add_argument(
        '--config', metavar='FILE', help='settings of the recipe (default: configs/NAME.py)'
    )
    parser.add_argument('--seeds', type=cli.integer(), nargs='+', default=SEEDS, metavar='N')
    parser.add_argument(
        '--keep_runs',
        type=cli.path,
        metavar='FOLDER',
        help='folder of the runs (default: runs/reference/NAME)',
    )
    parser.add_argument(
        '--out', type=cli.new_file, metavar='FILE', help='default: in the package, NAME.json'
    )
    flags = parser.parse(argv)
    spec = flags.config or str(ROOT / 'configs' / f'{flags.name}.py')
    folder = flags.keep_runs or Path('runs', 'reference', flags.name)
    out = flags.out or reference.FOLDER / f'{flags.name}.json'
    config = cli.read_config(spec, (*flags.changes, *changes(0)))
    if config.recipe not in (flags.name, ''):
        raise UserError(f'--config={spec} is the recipe {config.recipe!r}, not {flags.name!r}')
    seeds = sorted(set(flags.seeds))
    workdirs = [folder / f'seed{seed}' for seed in seeds]
    for seed, workdir in zip(seeds, workdirs, strict=True):
        train(spec, config, flags.changes, seed, workdir)
    command = f'python scripts/reference.py {flags.name}'
    command += f' --config {flags.config}' if flags.config else ''
    command += ''.join(f' {flag}' for flag in as_flags(flags.changes))
    command += f' --seeds {" ".join(map(str, seeds))}' if seeds != SEEDS else ''
    content = summarize(flags.name, seeds, workdirs, settings.to_dict(config), command)
    with files.replacing(out) as path:
        path.write_text(text(content))
    print(table(seeds, workdirs))
    print(f'written to {printable(out)}')


def changes(seed: int) -> list[tuple[str, str]]:
    """What a run of a seed has instead of the recipe's settings, by full name."""
    return [(f'config.{name}', str(value)) for name, value in ({'seed': seed} | CHANGES).items()]


def as_flags(changes: Changes) -> list[str]:
    """The flags that make changes of settings."""
    return [f'--{name}' if value is None else f'--{name}={value}' for name, value in changes]


def train(spec: str, config: ConfigDict, asked: Changes, seed: int, workdir: Path) -> None:
    """Train with a seed in a process of its own, unless the folder has the finished run.

    Args:
      spec: the recipe's file.
      config: its settings, with all changes.
      asked: those of the command line.
      seed, workdir: of the run.

    Raises:
      UserError: the training failed, or the folder has a run with other settings.
    """
    wanted = settings.to_dict(config) | {'seed': seed}
    if is_finished(workdir, config.optimizer.num_epochs):
        if json.loads((workdir / 'config.json').read_text()) != wanted:
            raise UserError(
                f'{printable(workdir)} is a run with other settings: delete it, or name another '
                '--keep_runs'
            )
        print(f'{printable(workdir)}: finished')
        return
    workdir.parent.mkdir(parents=True, exist_ok=True)
    flags = as_flags((*asked, *changes(seed)))
    command = [sys.executable, '-m', 'swav_jax.main', f'--config={spec}', f'--workdir={workdir}']
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    done = subprocess.run([*command, *flags], env=os.environ | {'PYTHONPATH': path})
    if done.returncode or not is_finished(workdir, config.optimizer.num_epochs):
        raise UserError(
            f'the run of seed {seed} is not finished (exit code {done.returncode}): run this '
            'again to resume it'
        )


def is_finished(workdir: Path, epochs: int) -> bool:
    """Whether a run reached its last epoch; summary.json is written at the end."""
    path = workdir / 'summary.json'
    return path.is_file() and json.loads(path.read_text()).get('epochs') == epochs


def summarize(
    name: str,
    seeds: Sequence[int],
    workdirs: Sequence[Path],
    config: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    """The content of the file: see `reference.Reference`."""
    rows = [read_rows(workdir / 'metrics.jsonl') for workdir in workdirs]
    events = [read_rows(workdir / 'events.jsonl') for workdir in workdirs]
    runs = [reference.curves(*logs) for logs in zip(rows, events, strict=True)]
    names = [curve for curve in runs[0] if all(curve in run for run in runs)]
    return {
        'recipe': name,
        'version': swav_jax.__version__,
        'machine': machine(),
        'command': command,
        'seeds': list(seeds),
        'config': {key: value for key, value in config.items() if key != 'seed'},
        'steps_per_epoch': reference.steps_per_epoch(rows[0]),
        'curves': {curve: reference.band([run[curve] for run in runs]) for curve in names},
    }


def machine() -> str:
    """Processor, cores, and what else moves the rounding."""
    cpu = Path('/proc/cpuinfo')
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    known = {key.strip(): value.strip() for key, _, value in (x.partition(':') for x in lines)}
    model = known.get('model name') or platform.processor() or platform.machine()
    if model in ('', 'unknown'):
        vendor = known.get('vendor_id', platform.machine())
        model = f'{vendor} family {known.get("cpu family")} model {known.get("model")}'
    avx = 'with' if 'avx512f' in known.get('flags', '').split() else 'without'
    devices = '' if jax.default_backend() == 'cpu' else f', {jax.devices()[0].device_kind}'
    return f'{model}, {os.cpu_count()} cores, {avx} AVX-512{devices}, jax {jax.__version__}'


def text(content: Mapping[str, Any]) -> str:
    """JSON with a point of a curve on each line, rounded to 6 digits."""
    head = {key: value for key, value in content.items() if key != 'curves'}
    curves = []
    for name, points in content['curves'].items():
        lines = [json.dumps([float(f'{x:.6g}') for x in point]) for point in points]
        curves.append(f'    {json.dumps(name)}: [\n      ' + ',\n      '.join(lines) + '\n    ]')
    body = json.dumps(head, indent=2).removesuffix('\n}')
    return f'{body},\n  "curves": {{\n' + ',\n'.join(curves) + '\n  }\n}\n'


def table(seeds: Sequence[int], workdirs: Sequence[Path]) -> str:
    """The runs' last values, and their median and range, as Markdown."""
    runs = [
        reference.curves(read_rows(w / 'metrics.jsonl'), read_rows(w / 'events.jsonl'))
        for w in workdirs
    ]
    titles = ' | '.join(f'seed {seed}' for seed in seeds)
    lines = [
        f'| after the last epoch | {titles} | median | range |',
        '|---' * (len(seeds) + 3) + '|',
    ]
    for name in (name for name in runs[0] if all(name in run for run in runs)):
        last = [run[name][max(run[name])] for run in runs]
        cells = ' | '.join(f'{value:.4g}' for value in last)
        lines.append(
            f'| `{name}` | {cells} | {median(last):.4g} | {min(last):.4g} to {max(last):.4g} |'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.exit(cli.run(main, sys.argv[1:]))
