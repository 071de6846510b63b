"""A run as a page and as pictures, to look at.

    python -m swav_jax.evaluate.report --workdir RUN

writes report.html, which needs no other file and no network, loss.png, prototypes.png and map.png
into the run's folder, and images and a projector of embeddings for TensorBoard.
"""

import argparse
import base64
import contextlib
import io
import json
import math
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

import swav_jax
from swav_jax import atomic
from swav_jax.data.images import Source
from swav_jax.evaluate import clusters, command, figures, gallery, tsne
from swav_jax.evaluate.features import Features
from swav_jax.monitor import read_rows
from swav_jax.tensorboard import TensorBoard

MAPPED = 1000  # images in the map; its cost grows with their square
PICTURED = 2000  # images to look at, where none are named

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


def write_all(
    workdir: Path, found: Features, source: Source, train: Source, config: ConfigDict, step: int
) -> None:
    """Write all that the module's docstring lists.

    Args:
      workdir: the run's folder.
      found: features of `source`.
      source: the images to show, labelled or not.
      train: the images that the run trains on, for its crops.
      config: the run's settings.
      step: steps that the run has made.
    """
    draw_loss(workdir)
    draw_prototypes(workdir, found, source)
    write(workdir, found, source, gallery.crops(train, config, images=4))
    write_tensorboard(workdir, found, source, step)


def draw_loss(workdir: Path) -> None:
    """Write loss.png; nothing for a run without a logged step."""
    rows = read_rows(workdir / 'metrics.jsonl')
    if any(row['loss'] is not None for row in rows):
        _save(figures.loss(rows), workdir / 'loss.png')


def draw_prototypes(workdir: Path, found: Features, source: Source) -> None:
    """Write prototypes.png: the largest prototypes and those images of `source` nearest to them."""
    _save(figures.prototypes(found, source), workdir / 'prototypes.png')


def write(
    workdir: Path,
    found: Features,
    source: Source,
    crops: Sequence[Sequence[np.ndarray]] = (),
) -> None:
    """Write report.html and map.png from what the run has logged and from features of images.

    Args:
      workdir: the run's folder; what is not in it is left out of the report.
      found: features of `source`.
      source: the images to show, labelled or not.
      crops: some images' crops as the network saw them, as `gallery.crops` makes them.
    """
    rows, events = (read_rows(workdir / name) for name in ('metrics.jsonl', 'events.jsonl'))
    summary, config = (_read(workdir / name) for name in ('summary.json', 'config.json'))
    scatter = _map(found, source)
    if scatter:
        _save(scatter, workdir / 'map.png')
    sections = [
        _curves(rows, events, config),
        _prototypes(found, source),
        _mapped(scatter, found),
        _retrieval(found, source),
        _crops(crops),
        _settings(config),
    ]
    template = string.Template(
        resources.files('swav_jax.evaluate').joinpath('report.html').read_text()
    )
    page = template.substitute(
        title=escape(workdir.resolve().name),
        subtitle=escape(_subtitle(config, summary, len(found))),
        tiles=''.join(_tile(*tile) for tile in _tiles(summary)),
        sections='\n'.join(sections),
        footer=f'swav_jax {escape(swav_jax.__version__)}',
    )
    with atomic.replacing(workdir / 'report.html') as path:
        path.write_text(page)


def write_tensorboard(workdir: Path, found: Features, source: Source, step: int) -> None:
    """Add the prototypes' images and a projector of embeddings to the run's TensorBoard."""
    # A square of thumbnails: tensorboardX leaves the rest of one unset.
    chosen = _some(found, math.isqrt(min(MAPPED, np.count_nonzero(found.readable))) ** 2)
    if (workdir / 'tensorboard' / f'{step:05}').exists():  # by an earlier call
        return
    with contextlib.closing(TensorBoard(workdir / 'tensorboard')) as board:
        for place, item in enumerate(gallery.prototypes(found, source, most=30, images=10)):
            strip = np.concatenate([gallery.thumbnail(source, i) for i in item['nearest']], axis=1)
            board.image(f'prototypes/{place:02}', strip, step)
        board.flush()
    # An embedding lies in files of its own.
    with SummaryWriter(str(workdir / 'tensorboard'), write_to_disk=False) as writer:
        thumbnails = np.stack([gallery.thumbnail(source, i, 32) for i in chosen])
        writer.add_embedding(
            found.embeddings[chosen],
            metadata=[_caption(found, source, i) for i in chosen],
            label_img=thumbnails.transpose(0, 3, 1, 2) / 255,
            global_step=step,
        )


def _caption(found: Features, source: Source, index: int) -> str:
    text = source.name(index)
    if found.labels is not None:
        text = f'{gallery.class_name(source, found.labels[index])} {text}'
    return ' '.join(text.split())


def _some(found: Features, count: int) -> np.ndarray:
    """The numbers of at most `count` readable images, evenly spread."""
    usable = np.flatnonzero(found.readable)
    count = min(count, len(usable))
    return usable[np.arange(count) * len(usable) // max(count, 1)]


# Sections of the page


def _subtitle(config: Mapping[str, Any], summary: Mapping[str, Any], looked_at: int) -> str:
    parts = []
    if config:
        trunk, data = config['model']['trunk'], config['data']
        crops = zip(data['num_crops'], data['size_crops'], strict=True)
        parts.append(
            f'{trunk["name"]}, depth {trunk["depth"]}'
            if trunk['name'] == 'resnet'
            else trunk['name']
        )
        parts.append(f'trained on {data["source"]}')
        parts.append('crops ' + ' + '.join(f'{n}×{size}' for n, size in crops))
    if summary.get('epochs'):
        parts.append(f'{summary["epochs"]:g} epochs')
    return '; '.join([*parts, f'shown with {looked_at:,} images']) + '.'


def _tiles(summary: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Values and what they are."""
    if 'knn_top1' in summary:
        before = summary.get('knn_top1_untrained')
        note = '' if before is None else f', {before:.1f}% untrained'
        yield f'{summary["knn_top1"]:.1f}%', f'kNN top-1{note}'
    if 'nmi' in summary:
        yield f'{summary["nmi"]:.3f}', 'NMI of prototypes and labels'
    if summary.get('loss_last') is not None:
        share = summary['loss_last_over_ln_k']
        yield f'{summary["loss_last"]:.2f}', f'loss, {share:.0%} of ln K'
    if summary.get('images_per_second'):
        yield f'{summary["images_per_second"]:,.0f}', 'images a second'
    if 'data_wait_share' in summary:
        yield f'{summary["data_wait_share"]:.0%}', 'of the time waiting for data'
    if 'steps' in summary:
        yield f'{summary["steps"]:,}', 'steps'


def _tile(value: str, text: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'


def _section(title: str, text: str, body: str) -> str:
    return f'<h2>{escape(title)}</h2>\n<p>{escape(text)}</p>\n{body}'


def _curves(rows: Sequence[Mapping], events: Sequence[Mapping], config: Mapping[str, Any]) -> str:
    rows = [row for row in rows if row.get('loss') is not None]
    if not rows:
        return ''
    ln_k = figures.ln_k(rows)
    references = {'loss': (ln_k, 'ln K'), 'code_entropy': (ln_k, 'ln K')}
    if config:
        head = config['model']['head']
        references['active_prototypes'] = (head['num_clusters'][0], 'all')
        references['embedding_std'] = (1 / math.sqrt(head['dims'][-1]), 'in all directions')
    learned = [
        {name.removesuffix('_untrained'): value for name, value in row.items()} for row in events
    ]
    drawn = [
        (title, figures.metric(learned, name, title))
        for name, title in (('knn_top1', 'kNN top-1, percent'), ('nmi', 'NMI'))
    ]
    for name, title in CURVES.items():
        # The first row's speed is that of the compilation.
        shown = rows[1:] if name in ('images_per_second', 'data_wait') else rows
        drawn.append((title, figures.metric(shown, name, title, *references.get(name, (None, '')))))
    images = [f'<img src="{_svg(figure)}" alt="{escape(t)}">' for t, figure in drawn if figure]
    return _section(
        'Curves',
        'A loss that stays at ln K, codes as uniform as ln K, few prototypes in use or embeddings '
        'without spread are signs of a collapse.',
        f'<div class="charts">{"".join(images)}</div>',
    )


def _prototypes(found: Features, source: Source) -> str:
    if not found.scores:
        return ''
    cards = []
    for item in gallery.prototypes(found, source, most=30, images=8):
        label = f' · {item["share"]:.0%} {item["label"]}' if 'label' in item else ''
        count = '1 image' if item['size'] == 1 else f'{item["size"]:,} images'
        cards.append(
            f'<div class="card"><div class="caption"><b>{count}</b>{escape(label)} '
            f'<span>prototype {item["prototype"]}</span></div>'
            f'<div class="strip">{"".join(_thumb(source, i) for i in item["nearest"])}</div></div>'
        )
    used = np.count_nonzero(clusters.sizes(clusters.assign(found.scores[0]), 1))
    return _section(
        'Prototypes',
        f'{used} of {found.scores[0].shape[1]} prototypes are the nearest one of some image. The '
        'largest, each with the images that are nearest to it; nobody told the network the names.',
        f'<div class="cards">{"".join(cards)}</div>',
    )


def _map(found: Features, source: Source) -> Figure | None:
    chosen = _some(found, MAPPED)
    if found.embeddings is None or len(chosen) < 4:
        return None
    points = tsne.embed(found.embeddings[chosen])
    if found.labels is not None and found.labels.max() < 20:
        names = [gallery.class_name(source, i) for i in range(found.labels.max() + 1)]
        return figures.point_map(points, found.labels[chosen], names)
    return figures.point_map(points, clusters.assign(found.scores[0][chosen]), None)


def _mapped(scatter: Figure | None, found: Features) -> str:
    if scatter is None:
        return ''
    by = 'class' if found.labels is not None and found.labels.max() < 20 else 'prototype'
    return _section(
        'Map of the embeddings',
        f'{len(_some(found, MAPPED)):,} images, by t-SNE: near each other where their embeddings '
        f'are. The colour is the {by}.',
        f'<img class="map" src="{_svg(scatter)}" alt="Map of the embeddings">',
    )


def _retrieval(found: Features, source: Source) -> str:
    lines = []
    for query, nearest in gallery.neighbors(found, queries=10, images=8):
        images = [_thumb(source, query, 'query')]
        for index in nearest:
            known = found.labels is not None
            other = known and found.labels[index] != found.labels[query]
            images.append(_thumb(source, index, 'thumb other' if other else 'thumb'))
        lines.append(f'<div class="card"><div class="strip">{"".join(images)}</div></div>')
    note = ' Those of another class are faded.' if found.labels is not None else ''
    return _section(
        'Nearest neighbours',
        f'An image, and those with the most similar trunk features.{note}',
        f'<div class="cards">{"".join(lines)}</div>',
    )


def _crops(crops: Sequence[Sequence[np.ndarray]]) -> str:
    if not crops:
        return ''
    lines = []
    for image in crops:
        parts = []
        for crop in image:
            side = max(28, min(160, 2 * crop.shape[0] if crop.shape[0] < 64 else crop.shape[0]))
            uri = gallery.data_uri(crop)
            parts.append(f'<img src="{uri}" width="{side}" height="{side}" alt="crop">')
        lines.append(f'<div class="card"><div class="strip">{"".join(parts)}</div></div>')
    return _section(
        'Crops as the network saw them',
        'All crops of some training images in the first epoch.',
        f'<div class="cards">{"".join(lines)}</div>',
    )


def _settings(config: Mapping[str, Any]) -> str:
    if not config:
        return ''
    lines = ''.join(
        f'<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>' for name, value in _flat(config)
    )
    table = f'<details><summary>All settings</summary><table>{lines}</table></details>'
    return f'<h2>Settings</h2>\n{table}'


def _flat(config: Mapping[str, Any], prefix: str = 'config') -> Iterable[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{prefix}.{name}')
        else:
            yield f'{prefix}.{name}', json.dumps(value)


def _thumb(source: Source, index: int, kind: str = 'thumb') -> str:
    uri = gallery.data_uri(gallery.thumbnail(source, int(index)))
    return f'<img class="{kind}" src="{uri}" alt="{escape(source.name(int(index)))}">'


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format='svg', metadata={'Date': None})
    return f'data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}'


def _save(figure: Figure, path: Path) -> None:
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format='png')


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def main(arguments: argparse.Namespace) -> None:
    """Write the report of the run that the command line names."""
    model = command.load(arguments)
    config = model.config
    shown = arguments.source or config.evaluate.test_source
    limit = arguments.limit or (0 if shown else PICTURED)
    source = model.open(shown or config.data.source, limit)
    found = model.extract(source, progress=True)
    train = model.open(config.data.source, config.data.limit)
    write_all(model.workdir, found, source, train, config, model.step)
    print(f'written to {model.workdir / "report.html"}')


if __name__ == '__main__':
    parser = command.parser(__doc__, weights=False)
    parser.add_argument('--source', help='images to show (default: config.evaluate.test_source)')
    sys.exit(command.run(main, parser))
