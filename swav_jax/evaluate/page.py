"""The content of a report's page; its layout is in report.html."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from swav_jax.config import trunks
from swav_jax.data.images import Source
from swav_jax.evaluate import diagnosis, figures, gallery, reference
from swav_jax.evaluate.extraction import Features
from swav_jax.evaluate.metrics import CURVES, measured, with_untrained
from swav_jax.runs.results import PIXELS, WITHOUT_TRAINING

Picture = dict[str, Any]  # `src`, and other attributes that report.html uses


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


def tiles(summary: Mapping[str, float], events: figures.Rows) -> Iterable[tuple[str, str]]:
    """Values of the summary, and a text below each."""
    for name, metric in measured(events).items():
        if name in summary:
            text = ', '.join([metric.tile, *metric.without_training(name, summary)])
            yield metric.form.format(summary[name]), text
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
        of_one = diagnosis.images_of_a_device(config)
        batch = max(images // steps // of_one, 1) * of_one
    content = {
        'findings': diagnosis.findings(rows, events, summary, config, batch),
        'is_long_enough': diagnosis.is_long_enough(rows, config),
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
    content['other_settings'] = reference.differences(recipe, config)
    if steps and steps != recipe.steps_per_epoch:
        content['other_settings'].append(('steps of an epoch', recipe.steps_per_epoch, steps))
    return content


def curves(
    rows: figures.Rows,
    events: figures.Rows,
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
    learned = with_untrained(events)
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
        for name, metric in measured(events).items()
    ]
    for name, title in CURVES.items():
        # The first row's speed includes the compilation.
        shown = rows[1:] if name in ('images_per_second', 'data_wait') else rows
        height, label = references.get(name, (None, ''))
        figure = figures.metric(shown, name, title, height, label, bands.get(name))
        drawn.append((title, figure))
    return [{'src': figures.svg(figure), 'alt': title} for title, figure in drawn if figure]


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
    return {'src': figures.svg(scatter), 'images': len(gallery.spread(found)), 'colour': colour}


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


def _thumb(source: Source, index: int, kind: str = 'thumb') -> Picture:
    uri = gallery.data_uri(gallery.thumbnail(source, int(index)))
    return {'src': uri, 'alt': source.name(int(index)), 'kind': kind}
