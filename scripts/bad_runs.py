"""Train the demo with one bad setting at a time, and draw how each goes wrong.

    python scripts/bad_runs.py --out docs/learning

trains the demo for some minutes with each of `BAD`, and once as it is, draws NAME.png for
docs/learning.md, and prints the signs that the report finds. Run it again to resume: finished runs
are used again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from swav_jax import cli, files
from swav_jax.errors import UserError, printable
from swav_jax.evaluate import diagnosis, figures, reference
from swav_jax.runs.rows import read_rows

ROOT = Path(__file__).parent.parent
CONFIG = 'configs/demo.py'
RATE = 'optimizer.param_schedulers.lr.auto_lr_scaling.base_value'
CURVES = {
    'loss_over_ln_k': 'loss / ln K',
    'code_entropy': 'entropy of the codes',
    'active_prototypes': 'prototypes in use, in a batch',
    'embedding_std': 'spread of the embeddings',
}


def bad(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Settings of each run that differ from the demo's."""
    rate = config.optimizer.param_schedulers.lr.auto_lr_scaling.base_value
    batch = config.data.batchsize_per_replica
    return {
        'good': {},
        'prototypes': {'model.head.num_clusters': '300,', 'data.batchsize_per_replica': 64},
        'epsilon': {'loss.epsilon': 0.5},
        'learning_rate': {RATE: 30 * rate},
        'queue': {'loss.queue.queue_length': 30 * batch},
        'all': {
            'model.head.num_clusters': '300,',
            'data.batchsize_per_replica': 64,
            'loss.epsilon': 0.5,
            RATE: 30 * rate,
        },
    }


def main(argv: Sequence[str]) -> None:
    """Train, draw and print."""
    parser = cli.Parser(__doc__)
    parser.add_argument('--out', type=cli.new_folder, required=True, metavar='FOLDER')
    parser.add_argument(
        '--keep_runs',
        type=cli.path,
        default=Path('runs', 'bad'),
        metavar='FOLDER',
        help='folder of the runs (default: runs/bad)',
    )
    parser.add_argument('--steps', type=cli.integer(20), default=300, metavar='N', help='of a run')
    flags = parser.parse(argv)
    config = cli.read_config(str(ROOT / CONFIG), ())
    flags.out.mkdir(parents=True, exist_ok=True)
    for name, changes in bad(config).items():
        workdir = flags.keep_runs / name
        train(workdir, changes, flags.steps)
        print(f'{name}: {", ".join(found(workdir)) or "no sign"}')
        if name != 'good':
            figure = draw(workdir, flags.keep_runs / 'good', reference.read(config.recipe))
            with files.replacing(flags.out / f'{name}.png') as path:
                figures.write(figure, path, dpi=72, format='png')


def train(workdir: Path, changes: Mapping[str, Any], steps: int) -> None:
    """Train in a process of its own, unless that was done.

    Raises:
      UserError: it failed.
    """
    summary = workdir / 'summary.json'
    if summary.is_file() and json.loads(summary.read_text()).get('steps') == steps:
        return
    workdir.parent.mkdir(parents=True, exist_ok=True)
    changes = {'train.max_steps': steps, 'evaluate.report': False} | changes
    command = [sys.executable, '-m', 'swav_jax.main', f'--config={ROOT / CONFIG}']
    command += [f'--config.{name}={value}' for name, value in changes.items()]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    done = subprocess.run([*command, f'--workdir={workdir}'], env=os.environ | {'PYTHONPATH': path})
    if done.returncode:
        raise UserError(f'{printable(workdir)} ended with exit code {done.returncode}')


def found(workdir: Path) -> list[str]:
    """The signs that a report of the run names."""
    rows, events = (read_rows(workdir / f'{name}.jsonl') for name in ('metrics', 'events'))
    config, summary = (
        json.loads((workdir / f'{name}.json').read_text()) for name in ('config', 'summary')
    )
    batch = config['data']['batchsize_per_replica']  # on one device
    return [sign.name for sign in diagnosis.findings(rows, events, summary, config, batch)]


def draw(workdir: Path, good: Path, recipe: reference.Reference | None) -> Figure:
    """Curves of a bad run in blue, of the good one in gray, and the recipe's band in orange."""
    figure = Figure(figsize=(12, 2.6), layout='constrained')
    for axes, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        last = 0.0
        for folder, color in ((good, figures.GRAY), (workdir, figures.BLUE)):
            rows = [row for row in read_rows(folder / 'metrics.jsonl') if row.get(name) is not None]
            epochs = [row['epoch'] for row in rows]
            axes.plot(epochs, [row[name] for row in rows], color=color, linewidth=1.6)
            last = max([last, *epochs])
        if recipe and name in recipe.curves:
            epochs, low, _, high = recipe.bands()[name].T
            axes.fill_between(epochs, low, high, color=figures.ORANGE, alpha=0.2, linewidth=0)
        axes.set_xlim(0, last)
        axes.set_title(title, loc='left', fontsize=10)
        axes.set_xlabel('epoch')
        axes.spines[['top', 'right']].set_visible(False)
    return figure


if __name__ == '__main__':
    sys.exit(cli.run(main, sys.argv[1:]))
