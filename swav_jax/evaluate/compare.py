r"""One page over several runs: final figures, curves over each other, settings that differ.

    python -m swav_jax.evaluate.compare RUN RUN ... [--out compare.html] [--json]

The page needs no other file and no network. It is made from metrics.jsonl, events.jsonl,
summary.json and config.json in the folders, which may be copies without checkpoints. Of a run that
is not finished, the last logged step counts.

With --json, one JSON object is printed instead, and a page is written only if --out names it:

    {"runs": [{"name", "folder", "finished", "summary", "last", "settings"}, ...],
     "settings": [NAME, ...]}

`last` has the last value of each number in metrics.jsonl and events.jsonl, null if it was not
finite; `settings` of a run are those that differ between the runs and that it has, or null if its
config.json is missing or damaged.
"""

if __name__ == '__main__':  # before the imports, so that mistakes are reported without them
    from swav_jax import commands

    commands.run('compare')

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swav_jax import cli, files
from swav_jax.cli.flags import compare as parse_compare
from swav_jax.errors import printable
from swav_jax.evaluate import figures, records, templates
from swav_jax.evaluate.metrics import CURVES, Metric, measured, with_untrained
from swav_jax.runs.results import without_end
from swav_jax.runs.rows import read_rows

COMPARED = ('lr', 'active_prototypes', 'code_entropy', 'embedding_std', 'grad_norm')  # of CURVES

_LOGGED = {'epochs': 'epoch', 'loss_last_over_ln_k': 'loss_over_ln_k'}  # by names in summary.json

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run has recorded.

    Attributes:
      name: a label that no other run has.
      rows, events: finite numbers of metrics.jsonl and events.jsonl.
      summary: finite numbers of summary.json.
      last: the last value of each logged number, None if it was not finite.
      settings: JSON of each setting by its full name; empty if they are not known.
    """

    name: str
    folder: Path
    rows: figures.Rows
    events: figures.Rows
    summary: Values
    last: Values
    settings: Mapping[str, str]

    @property
    def finished(self) -> bool:
        """Whether the summary is of the last logged step; one of an earlier end is not."""
        return self.summary.get('steps', -1) >= self.last.get('step', 0)

    @property
    def final(self) -> Values:
        """Final figures, by the names of logged numbers."""
        summary = self.summary if self.finished else {}
        return dict(self.last) | {_LOGGED.get(name, name): x for name, x in summary.items()}


def run(flags: argparse.Namespace) -> None:
    """Write the page, or print the JSON object."""
    runs = [read(folder, name) for folder, name in zip(flags.runs, labels(flags.runs), strict=True)]
    out = flags.out or (None if flags.json else Path('compare.html'))
    if out:
        text = page(runs)
        out.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(out) as path:
            path.write_text(text, encoding='utf-8')
    if flags.json:
        print(json.dumps(as_json(runs), indent=2))
    else:
        print(f'written to {printable(out)}')


main = cli.command(__doc__, parse_compare, run)


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parts = [folder.absolute().parts for folder in folders]

    def label(mine: tuple[str, ...]) -> str:
        for count in range(1, len(mine)):
            if sum(other[-count:] == mine[-count:] for other in parts) == 1:
                return str(Path(*mine[-count:]))
        return str(Path(*mine))

    return [label(mine) for mine in parts]


def read(folder: Path, name: str) -> Run:
    """Read a run's records; a damaged summary.json or config.json is reported and left out.

    Raises:
      OSError: metrics.jsonl or events.jsonl cannot be read.
    """

    def read_object(file: str) -> Values:
        try:
            return records.read(folder / file)
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, 'strerror', None) or cli.first_line(error)
            line = printable(f'{folder / file} is left out ({reason})')
            print(f'note: {line}', file=sys.stderr)
            return {}

    rows, events = (read_rows(folder / f'{kind}.jsonl') for kind in ('metrics', 'events'))
    last = dict(rows[-1]) if rows else {}
    for row in events:
        last |= {key: value for key, value in row.items() if key not in ('step', 'epoch')}
    return Run(
        name=name,
        folder=folder,
        rows=[records.numbers(row) for row in rows],
        events=[records.numbers(row) for row in events],
        summary=records.numbers(read_object('summary.json')),
        last=last,
        settings=records.settings(read_object('config.json')),
    )


def differences(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """The settings that differ between the runs that have some, by name, without `choices`.

    Returns:
      For each its JSON in every run, None in a run without it.
    """
    known = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in known for name in settings)
    return {
        name: [run.settings.get(name) for run in runs]
        for name in names
        if name != 'config.choices' and len({settings.get(name) for settings in known}) > 1
    }


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """The object that --json prints."""
    names = list(differences(runs))
    return {
        'runs': [
            {
                'name': run.name,
                'folder': str(run.folder.absolute()),
                'finished': run.finished,
                'summary': run.summary,
                'last': run.last,
                'settings': {
                    # JSON has no NaN: it becomes a text.
                    name: json.loads(run.settings[name], parse_constant=str)
                    for name in names
                    if name in run.settings
                }
                if run.settings
                else None,
            }
            for run in runs
        ],
        'settings': names,
    }


def page(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    metrics = measured(row for run in runs for row in run.events)
    columns = dict(_columns(runs, metrics))
    differing = differences(runs)
    settings = {name: _setting_cells(runs, differing[name]) for name in sorted(differing)}
    shown = []
    for place, run in enumerate(runs):
        color, dashes = figures.line_style(place)
        shown.append(
            {
                'name': run.name,
                'note': '' if run.finished else _progress(run),
                'color': color,
                'dashes': ' '.join(f'{3 * length:g}' for length in dashes) or 'none',
                'cells': [cells[place] for cells in columns.values()],
            }
        )
    count = sum(bool(run.settings) for run in runs)
    return templates.render(
        'compare.html',
        title=f'Comparison of {len(runs)} runs',
        columns=list(columns),
        runs=shown,
        curves=_curves(runs, metrics),
        settings=settings,
        unknown=count < len(runs),
        settings_have_usual=any(cell['other'] for cells in settings.values() for cell in cells),
        no_settings='All settings are the same.'
        if count == len(runs)
        else f'No differences: config.json can be read in {count} of {len(runs)} runs.',
    )


def _progress(run: Run) -> str:
    return f'not finished, step {run.last["step"]:,}' if run.rows else 'no step logged'


def _columns(
    runs: Sequence[Run], metrics: Mapping[str, Metric]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield titles and cells of the table of final figures."""
    finals = [run.final for run in runs]
    yield 'epochs', _cells(finals, 'epoch', '{:.4g}', None)
    yield 'loss / ln K', _cells(finals, 'loss_over_ln_k', '{:.3f}', False)
    for name, metric in metrics.items():
        if any(name in map(without_end, final) for final in finals):
            cells = _cells(finals, name, metric.form, metric.larger_is_better)
            for cell, final in zip(cells, finals, strict=True):
                cell['note'] = ', '.join(metric.without_training(name, final))
            yield metric.tile, cells
    yield 'images/s', _cells(finals, 'images_per_second', '{:,.0f}', True)


def _cells(
    finals: Sequence[Values], name: str, form: str, larger_is_better: bool | None
) -> list[dict[str, Any]]:
    """The cells of a column; the best ones are marked unless all are alike."""

    def text(final: Values) -> str:
        if name not in final:
            return '–'
        return 'not finite' if final[name] is None else form.format(final[name])

    texts = [text(final) for final in finals]
    numbers = {x: text(final) for final in finals if (x := final.get(name)) is not None}
    best = None
    if larger_is_better is not None and len(set(numbers.values())) > 1:
        choose: Callable[..., float] = max if larger_is_better else min
        best = numbers[choose(numbers)]
    return [{'text': text, 'note': '', 'best': text == best} for text in texts]


def _setting_cells(runs: Sequence[Run], values: Sequence[str | None]) -> list[dict[str, Any]]:
    """The cells of a setting; those unlike the value of most runs are `other`."""
    short = [value and _short(value) for value in values]
    if len(set(short)) == len(set(values)):  # it tells them apart
        values = short
    usual, count = Counter(values).most_common(1)[0]
    most = count > len(runs) / 2
    return [
        {
            'text': ('–' if run.settings else '?') if value is None else value,
            'other': bool(most and run.settings and value != usual),
        }
        for run, value in zip(runs, values, strict=True)
    ]


def _short(value: str) -> str:
    """A float in JSON with at most six digits; other values as they are."""
    try:
        return value if value.lstrip('-').isdigit() else f'{float(value):.6g}'
    except ValueError:
        return value


def _curves(runs: Sequence[Run], metrics: Mapping[str, Metric]) -> list[dict[str, str]]:
    """Pictures of the numbers of all runs over the epochs."""
    rows, events = [run.rows for run in runs], [with_untrained(run.events) for run in runs]
    title = 'Loss / ln K'
    label = 'ln K: all prototypes alike'
    drawn = [(title, figures.compared(rows, 'loss_over_ln_k', title, 1.0, label))]
    drawn += [
        (metric.title, figures.compared(events, name, metric.title))
        for name, metric in metrics.items()
    ]
    drawn += [(CURVES[name], figures.compared(rows, name, CURVES[name])) for name in COMPARED]
    return [{'src': figures.svg(figure), 'alt': title} for title, figure in drawn if figure]
