"""A run as a page and as pictures, to look at.

    python -m swav_jax.evaluate.report --workdir RUN

writes report.html, which needs no other file and no network, loss.png, prototypes.png and map.png
into the run's folder, and images and a projector of embeddings for TensorBoard. What cannot be
made, as of a damaged metrics.jsonl, is left out and named.
"""

if __name__ == '__main__':  # before the imports: TensorFlow reads its settings as it is imported
    from swav_jax import commands

    commands.run('report')

import argparse
import base64
import contextlib
import io
import json
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from swav_jax.errors import UserError
from swav_jax.evaluate import clusters, command, figures, gallery, labelled
from swav_jax.evaluate.extraction import Features, check
from swav_jax.runs.monitor import read_rows
from swav_jax.runs.tensorboard import TensorBoard
from swav_jax.terminal import printable

MAPPED = 1000  # images in the map: about 5 seconds of a CPU core
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
) -> bool:
    """Write all that the module's docstring lists; says what cannot be made, and raises nothing.

    Args:
      workdir: the run's folder.
      found: features of `source`.
      source: the images to show, labelled or not.
      train: the images that the run trains on, for its crops.
      config: the run's settings.
      step: steps that the run has made.

    Returns:
      Whether report.html was written.
    """
    missing = _Missing()
    crops = missing.without('the crops', lambda: gallery.crops(train, config, images=4), ())
    missing.without('loss.png', lambda: draw_loss(workdir))
    missing.without('prototypes.png', lambda: draw_prototypes(workdir, found, source))
    left_out = missing.without('report.html', lambda: write(workdir, found, source, crops))
    missing.extend(left_out or ())
    missing.without('tensorboard/', lambda: write_tensorboard(workdir, found, source, step))
    if missing:
        again = f'python -m swav_jax.evaluate.report --workdir={printable(workdir)}'
        print(f'the report lacks {"; ".join(missing)}: {again} writes it again', file=sys.stderr)
    return left_out is not None


class _Missing(list):
    """What could not be made, each with the reason."""

    def without(self, name: str, make: Callable[[], Any], instead: Any = None) -> Any:
        """What `make` makes; if that fails `instead`, and a line more in this list."""
        try:
            return make()
        except Exception as error:  # whatever it is, the run that is shown went well
            reason = getattr(error, 'strerror', None) or str(error) or 'no reason given'
            self.append(printable(f'{name} ({type(error).__name__}: {reason})')[:300])
            return instead


def draw_loss(workdir: Path) -> None:
    """Write loss.png; without a logged step there is none."""
    _save(figures.loss(_rows(workdir / 'metrics.jsonl')), workdir / 'loss.png')


def draw_prototypes(workdir: Path, found: Features, source: Source) -> None:
    """Write prototypes.png: the largest prototypes and those images of `source` nearest to them."""
    _save(figures.prototypes(found, source), workdir / 'prototypes.png')


def write(
    workdir: Path,
    found: Features,
    source: Source,
    crops: Sequence[Sequence[np.ndarray]] = (),
) -> list[str]:
    """Write report.html and map.png from what the run has logged and from features of images.

    Args:
      workdir: the run's folder; what is not in it is left out of the report.
      found: features of `source`.
      source: the images to show, labelled or not.
      crops: some images' crops as the network saw them, as `gallery.crops` makes them.

    Returns:
      What could not be made and is not on the page, with the reasons.
    """
    missing = _Missing()
    rows, events = (
        missing.without(name, lambda name=name: _rows(workdir / name), [])
        for name in ('metrics.jsonl', 'events.jsonl')
    )
    summary, config = (
        missing.without(name, lambda name=name: _read(workdir / name), {})
        for name in ('summary.json', 'config.json')
    )
    about = missing.without('what config.json says', lambda: _about(config), {})
    summary = _numbers(summary)
    scatter = missing.without('the map', lambda: _map(found, source))
    missing.without('map.png', lambda: _save(scatter, workdir / 'map.png'))
    sections = [
        missing.without(name, make, '')
        for name, make in (
            ('the curves', lambda: _curves(rows, events, about)),
            ('the prototypes', lambda: _prototypes(found, source)),
            ('the map', lambda: _mapped(scatter, found)),
            ('the neighbours', lambda: _retrieval(found, source)),
            ('the crops', lambda: _crops(crops)),
            ('the settings', lambda: _settings(config)),
        )
    ]
    template = string.Template(
        resources.files('swav_jax.evaluate').joinpath('report.html').read_text(encoding='utf-8')
    )
    page = template.substitute(
        title=_text(workdir.resolve().name),
        subtitle=_text(_subtitle(about, summary, found)),
        tiles=''.join(_tile(*tile) for tile in _tiles(summary)),
        sections='\n'.join(sections),
        footer=f'swav_jax {escape(swav_jax.__version__)}',
    )
    with atomic.replacing(workdir / 'report.html') as path:
        path.write_text(page, encoding='utf-8')
    return list(missing)


def _text(text: object) -> str:
    """Text, of the data or the user, as a part of a page."""
    return escape(printable(text))


def write_tensorboard(workdir: Path, found: Features, source: Source, step: int) -> None:
    """Add the prototypes' images and a projector of embeddings to the run's TensorBoard."""
    if (workdir / 'tensorboard' / f'{step:05}').exists():  # by an earlier call
        return
    # A square of thumbnails: tensorboardX leaves the rest of one unset.
    chosen = _some(found, math.isqrt(min(MAPPED, np.count_nonzero(found.readable))) ** 2)
    if not len(chosen) or found.embeddings is None:
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
    text = printable(source.name(int(index)))
    if found.labels is not None:
        text = f'{gallery.class_name(source, found.labels[index])} {text}'
    return ' '.join(text.split())


def _some(found: Features, count: int) -> np.ndarray:
    """The numbers of at most `count` readable images, evenly spread."""
    usable = np.flatnonzero(found.readable)
    count = min(count, len(usable))
    return usable[np.arange(count) * len(usable) // max(count, 1)]


# Sections of the page


def _about(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json, if there is one, says of the run, and where its curves would like to be."""
    if not config:
        return {}
    trunk, data, head = config['model']['trunk'], config['data'], config['model']['head']
    is_resnet = trunk['name'] == 'resnet'
    crops = zip(data['num_crops'], data['size_crops'], strict=True)
    return {
        'run': [
            f'{trunk["name"]}, depth {trunk["depth"]}' if is_resnet else str(trunk['name']),
            f'trained on {data["source"]}',
            'crops ' + ' + '.join(f'{n}×{size}' for n, size in crops),
        ],
        'active_prototypes': (float(head['num_clusters'][0]), 'all'),
        'embedding_std': (1 / math.sqrt(head['dims'][-1]), 'in all directions'),
    }


def _subtitle(about: Mapping[str, Any], summary: Mapping[str, float], found: Features) -> str:
    parts = list(about.get('run', ()))
    if summary.get('epochs'):
        parts.append(f'{summary["epochs"]:g} epochs')
    seen = np.count_nonzero(found.readable)
    bad = len(found) - seen
    unread = f', {bad:,} more cannot be read' if bad else ''
    return '; '.join([*parts, f'shown with {seen:,} images{unread}']) + '.'


def _tiles(summary: Mapping[str, float]) -> Iterable[tuple[str, str]]:
    """Values and what they are."""
    if 'knn_top1' in summary:
        before = summary.get('knn_top1_untrained')
        note = '' if before is None else f', {before:.1f}% untrained'
        yield f'{summary["knn_top1"]:.1f}%', f'kNN top-1{note}'
    if 'nmi' in summary:
        yield f'{summary["nmi"]:.3f}', 'NMI of prototypes and labels'
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


def _tile(value: str, text: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>'


def _section(title: str, text: str, body: str) -> str:
    return f'<h2>{escape(title)}</h2>\n<p>{escape(text)}</p>\n{body}'


def _curves(rows: figures.Rows, events: figures.Rows, about: Mapping[str, Any]) -> str:
    rows = [row for row in rows if 'loss' in row]
    if not rows:
        return ''
    references = dict.fromkeys(('loss', 'code_entropy'), (figures.ln_k(rows), 'ln K')) | about
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
    if not found.scores or not found.readable.any():
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
    return _section(
        'Prototypes',
        f'{gallery.used(found)} of {found.scores[0].shape[1]} prototypes are the nearest one of '
        'some image. The largest, each with the images that are nearest to it; nobody told the '
        'network the names.',
        f'<div class="cards">{"".join(cards)}</div>',
    )


def _map(found: Features, source: Source) -> Figure | None:
    chosen = _some(found, MAPPED)
    if found.embeddings is None or len(chosen) < 4:
        return None
    points = figures.tsne(found.embeddings[chosen])
    if _few_classes(found):
        names = [gallery.class_name(source, i) for i in range(found.labels.max() + 1)]
        return figures.point_map(points, found.labels[chosen], names)
    return figures.point_map(points, clusters.assign(found.scores[0][chosen]), None)


def _few_classes(found: Features) -> bool:
    """Whether each class can have a colour of its own."""
    return found.labels is not None and found.labels.max() < 20


def _mapped(scatter: Figure | None, found: Features) -> str:
    if scatter is None:
        return ''
    by = 'class' if _few_classes(found) else 'prototype'
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
            labels = [] if found.labels is None else found.labels[[query, index]]
            other = len(set(labels)) == 2 and min(labels) >= 0
            images.append(_thumb(source, index, 'thumb other' if other else 'thumb'))
        lines.append(f'<div class="card"><div class="strip">{"".join(images)}</div></div>')
    if not lines:
        return ''
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
        f'<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>' for name, value in _flat(config)
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
    return f'<img class="{kind}" src="{uri}" alt="{_text(source.name(int(index)))}">'


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    figures.write(figure, file, format='svg', metadata={'Date': None})
    return f'data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}'


def _save(figure: Figure | None, path: Path) -> None:
    """Write a figure; where there is none, no older one stays to be taken for it."""
    if figure is None:
        path.unlink(missing_ok=True)
        return
    with atomic.replacing(path) as temporary:
        figures.write(figure, temporary, dpi=120, format='png')


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    if not isinstance(found, dict):
        raise ValueError('it is damaged')
    return found


def _rows(path: Path) -> list[dict[str, float]]:
    """The finite numbers of each row of a .jsonl file; what is damaged has none."""
    return [_numbers(row) for row in read_rows(path) if isinstance(row, Mapping)]


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The values of a row that are numbers, and of a size that can be drawn."""
    return {
        name: value
        for name, value in row.items()
        if type(value) in (int, float) and abs(value) < 1e100  # false of NaN, too
    }


def _main(arguments: argparse.Namespace) -> None:
    """Write the report of the run that the command line names."""
    model = command.load(arguments)
    config = model.config
    shown = arguments.source or config.evaluate.test_source
    limit = arguments.limit or (0 if shown else PICTURED)
    source = model.open(shown or config.data.source, limit)
    labelled.say(source.notes)
    found = model.extract(source, progress=True)
    labelled.say(check(found, source, config))
    train = model.open(config.data.source, config.data.limit)
    if not write_all(model.workdir, found, source, train, config, model.step):
        raise UserError(f'{printable(model.workdir)}/report.html is not written')
    print(f'written to {printable(model.workdir / "report.html")}')


def main(argv: Sequence[str]) -> int:
    """Run the command line that the module's docstring explains; returns the exit code."""
    parser = command.parser(__doc__, weights=False)
    parser.add_argument('--source', help='images to show (default: config.evaluate.test_source)')
    return command.run(_main, parser, argv)
