"""The content of a report's page; its layout is in report.html."""

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

import swav_jax
from swav_jax.config import trunks
from swav_jax.data.images import Source
from swav_jax.errors import printable
from swav_jax.evaluate import diagnosis, figures, gallery, online, reference
from swav_jax.evaluate.extraction import Features
from swav_jax.runs.progress_line import PIXELS, UNTRAINED, WITHOUT_TRAINING, without_end

CURVES = {  # by the names in metrics.jsonl
    'loss': 'Loss',
    'lr': 'Learning rate',
    'code_entropy': 'Entropy of the codes',
    'active_prototypes': 'Prototypes in use, in a batch',
    'largest_prototype_share': 'Share of the largest prototype',
    'embedding_std': 'Spread of the embeddings',
    'grad_norm': 'Norm of the gradient',
    'update_norm': 'Norm of the update',
    'images_per_second': 'Images a second',
    'data_wait': 'Seconds a step waits for data',
}

Picture = dict[str, Any]  # `src`, and other attributes that report.html uses


def render(**content: Any) -> str:
    """Render the page; all of `content` is shown as text, not read as markup."""
    return _environment.get_template('report.html').render(content, version=swav_jax.__version__)


def _shown(value: Any) -> Any:
    return (
        value if hasattr(value, '__html__') else printable(value)
    )  # the output of a macro is markup


_environment = Environment(
    loader=PackageLoader('swav_jax.evaluate', '.'),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)


def about_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The run in words, and reference values of its curves, from config.json if there is one."""
    if not config:
        return {}
    trunk, data, head = config['model']['trunk'], config['data'], config['model']['head']
    crops = zip(data['num_crops'], data['size_crops'], strict=True)
    return {
        'run': [
            trunks.title(trunk),
            f'trained on {data["source"]}',
            'crops ' + ' + '.join(f'{n}×{size}' for n, size in crops),
        ],
        'active_prototypes': (float(head['num_clusters'][0]), 'all'),
        'embedding_std': (1 / math.sqrt(head['dims'][-1]), 'in all directions'),
    }


def subtitle(about: Mapping[str, Any], summary: Mapping[str, float], found: Features) -> str:
    """A sentence on the run."""
    parts = list(about.get('run', ()))
    if summary.get('epochs'):
        parts.append(f'{summary["epochs"]:g} epochs')
    seen = np.count_nonzero(found.readable)
    bad = len(found) - seen
    unread = f', {bad:,} more cannot be read' if bad else ''
    return '; '.join([*parts, f'shown with {seen:,} images{unread}']) + '.'


def measured(events: figures.Rows) -> dict[str, online.Metric]:
    """All numbers of online evaluations: those in events.jsonl, and those of this version."""
    names = {without_end(name) for row in events for name in row}
    others = sorted(names - online.METRICS.keys() - {'step', 'epoch'})
    return online.METRICS | {name: online.Metric(name, name) for name in others}


def tiles(
    summary: Mapping[str, float], metrics: Mapping[str, online.Metric]
) -> Iterable[tuple[str, str]]:
    """Values of the summary, and a text below each."""
    for name, metric in metrics.items():
        if name in summary:
            note = ''.join(
                f', {metric.form.format(summary[f"{name}{end}"])} {what}'
                for end, what in WITHOUT_TRAINING.items()
                if f'{name}{end}' in summary
            )
            yield metric.form.format(summary[name]), f'{metric.tile}{note}'
    if 'loss_last' in summary:
        share = summary.get('loss_last_over_ln_k')
        note = '' if share is None else f', {share:.0%} of ln K'
        yield f'{summary["loss_last"]:.2f}', f'loss{note}'
    if summary.get('images_per_second'):
        yield f'{summary["images_per_second"]:,.0f}', 'images a second'
    if 'data_wait_share' in summary:
        yield f'{summary["data_wait_share"]:.0%}', 'of the time waiting for data'
    if 'steps' in summary:
        yield f'{summary["steps"]:,.0f}', 'steps'


def diagnose(
    rows: figures.Rows,
    events: figures.Rows,
    summary: Mapping[str, float],
    config: Mapping[str, Any],
    recipe: reference.Reference | None,
    images: int | None,
) -> dict[str, Any]:
    """Whether the run goes like others of its recipe, and signs of trouble; empty without a log.

    Args:
      rows, events, summary, config: of the run.
      recipe: its reference curves.
      images: number of training images, for the batch over all devices; None if not known.
    """
    if not rows or not config:
        return {}
    steps, batch = reference.steps_per_epoch(rows), None
    if images and steps:
        per_replica = config['data']['batchsize_per_replica']
        batch = max(images // steps // per_replica, 1) * per_replica
    content = {
        'findings': diagnosis.findings(rows, events, summary, config, batch),
        'named': config.get('recipe', ''),
        'recipe': recipe,
    }
    if recipe is None:
        return content
    titles = CURVES | {'loss_over_ln_k': 'Loss / ln K'}
    titles |= {name: metric.title for name, metric in measured(events).items()}
    content['curves'] = [
        (
            titles.get(verdict.name, verdict.name),
            str(verdict),
            reference.MEANING.get((verdict.name, verdict.side), ''),
        )
        for verdict in reference.compare(recipe, reference.curves(rows, events))
    ]
    content['outside'] = sum(said != reference.INSIDE for _, said, _ in content['curves'])
    content['other_settings'] = [
        (f'config.{name}', json.dumps(theirs), json.dumps(ours))
        for name, theirs, ours in reference.differences(recipe, config)
    ]
    if steps and steps != recipe.steps_per_epoch:
        content['other_settings'].append(('steps of an epoch', recipe.steps_per_epoch, steps))
    return content


def curves(
    rows: figures.Rows,
    events: figures.Rows,
    metrics: Mapping[str, online.Metric],
    about: Mapping[str, Any],
    recipe: reference.Reference | None = None,
) -> list[Picture]:
    """Pictures of all measured numbers over the epochs, none without a loss.

    Curves that the recipe has get its band.
    """
    rows = [row for row in rows if 'loss' in row]
    if not rows:
        return []
    references = dict.fromkeys(('loss', 'code_entropy'), (figures.ln_k(rows), 'ln K')) | about
    pixels = {
        name: (value, WITHOUT_TRAINING[PIXELS])
        for row in events
        for name, value in row.items()
        if name.endswith(PIXELS)
    }
    bands = recipe.bands() if recipe else {}
    if 'loss_over_ln_k' in bands and figures.ln_k(rows):
        bands['loss'] = bands['loss_over_ln_k'] * [1, *[figures.ln_k(rows)] * 3]
    learned = [
        {name.removesuffix(UNTRAINED): value for name, value in row.items()} for row in events
    ]
    drawn = [
        (
            metric.title,
            figures.metric(
                learned,
                name,
                metric.title,
                *pixels.get(f'{name}{PIXELS}', (None, '')),
                band=bands.get(name),
            ),
        )
        for name, metric in metrics.items()
    ]
    for name, title in CURVES.items():
        # The first row's speed includes the compilation.
        shown = rows[1:] if name in ('images_per_second', 'data_wait') else rows
        height, label = references.get(name, (None, ''))
        figure = figures.metric(shown, name, title, height, label, bands.get(name))
        drawn.append((title, figure))
    return [{'src': svg(figure), 'alt': title} for title, figure in drawn if figure]


def prototypes(found: Features, source: Source) -> dict[str, Any]:
    """The largest prototypes, each with its nearest images; empty without prototypes."""
    if not found.scores or not found.readable.any():
        return {}
    largest = [
        item | {'images': [_thumb(source, i) for i in item['nearest']]}
        for item in gallery.prototypes(found, source, most=30, images=8)
    ]
    return {'used': gallery.used(found), 'of': found.scores[0].shape[1], 'largest': largest}


def embeddings(scatter: Figure | None, found: Features) -> dict[str, Any]:
    """The map of the embeddings; empty without one."""
    if scatter is None:
        return {}
    colour = 'class' if figures.few_classes(found) else 'prototype'
    return {'src': svg(scatter), 'images': len(gallery.spread(found)), 'colour': colour}


def neighbors(found: Features, source: Source) -> list[list[Picture]]:
    """Some images, each followed by those with the most similar trunk features."""
    lines = []
    for query, nearest in gallery.neighbors(found, queries=10, images=8):
        line = [_thumb(source, query, 'query')]
        for index in nearest:
            labels = [] if found.labels is None else found.labels[[query, index]]
            other = len(set(labels)) == 2 and min(labels) >= 0
            line.append(_thumb(source, index, 'thumb other' if other else 'thumb'))
        lines.append(line)
    return lines


def crops(images: Sequence[Sequence[np.ndarray]]) -> list[list[Picture]]:
    """The crops of each image; small ones are enlarged."""

    def side(size: int) -> int:
        return max(28, min(160, 2 * size if size < 64 else size))

    return [
        [{'src': gallery.data_uri(crop), 'side': side(len(crop))} for crop in image]
        for image in images
    ]


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """All settings by their full names, as JSON."""
    flat = flatten_dict({'config': config}, sep='.')
    return {name: json.dumps(value) for name, value in flat.items()}


def svg(figure: Figure) -> str:
    """A figure as a data URI."""
    file = io.BytesIO()
    figures.write(figure, file, format='svg', metadata={'Date': None})
    return f'data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}'


def _thumb(source: Source, index: int, kind: str = 'thumb') -> Picture:
    uri = gallery.data_uri(gallery.thumbnail(source, int(index)))
    return {'src': uri, 'alt': source.name(int(index)), 'kind': kind}
