"""A page and pictures of what a run learned.

    python -m swav_jax.evaluate.report --workdir RUN

writes report.html, a page that needs no other file and no network, and loss.png, prototypes.png and
map.png into the run's folder, and images and a projector of embeddings for TensorBoard. If a part
cannot be made, for example from a damaged metrics.jsonl, it is left out and reported.
"""

if __name__ == '__main__':  # before the imports, so that mistakes are reported without them
    from swav_jax import commands

    commands.run('report')

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from swav_jax import cli, files
from swav_jax.cli.flags import report as parse_report
from swav_jax.data.images import Source
from swav_jax.errors import UserError, printable
from swav_jax.evaluate import command, figures, gallery, online, page, records, reference, templates
from swav_jax.evaluate.extraction import Features
from swav_jax.runs.tensorboard import TensorBoard


def run(flags: argparse.Namespace) -> None:
    """Write the report of a run."""
    model = command.load(flags)
    config = model.config
    shown = flags.source or config.evaluate.test_source
    limit = flags.limit or (0 if shown else online.PICTURED)
    source = command.open_source(model, shown or config.data.source, limit)
    found = command.extract(model, source)
    train = model.open(config.data.source, config.data.limit)
    if not write_all(model.workdir, found, source, train, config, model.step):
        raise UserError(f'{printable(model.workdir)}/report.html is not written')
    print(f'written to {printable(model.workdir / "report.html")}')


main = cli.command(__doc__, parse_report, run)


def write_all(
    workdir: Path, found: Features, source: Source, train: Source, config: ConfigDict, step: int
) -> bool:
    """Write all that the module's docstring lists; prints what failed, and raises nothing.

    Shown are the images of `source` with their features, and crops of `train`, the run's images.

    Returns:
      Whether report.html was written.
    """
    missing = _Missing()
    crops = missing.without('the crops', lambda: gallery.crops(train, config, images=4), ())
    missing.without('loss.png', lambda: draw_loss(workdir))
    missing.without('prototypes.png', lambda: draw_prototypes(workdir, found, source))
    left_out = missing.without(
        'report.html', lambda: write(workdir, found, source, crops, len(train))
    )
    missing.extend(left_out or ())
    missing.without('tensorboard/', lambda: write_tensorboard(workdir, found, source, step))
    if missing:
        again = f'python -m swav_jax.evaluate.report --workdir={printable(workdir)}'
        print(f'the report lacks {"; ".join(missing)}: {again} writes it again', file=sys.stderr)
    return left_out is not None


class _Missing(list):
    """Lines on what failed."""

    def without(self, name: str, make: Callable[[], Any], instead: Any = None) -> Any:
        """Return what `make` returns or, if it fails, `instead`, and add a line to this list."""
        try:
            return make()
        except Exception as error:  # whatever it is, the run itself succeeded
            reason = getattr(error, 'strerror', None) or str(error) or 'no reason given'
            self.append(printable(f'{name} ({type(error).__name__}: {reason})')[:300])
            return instead


def draw_loss(workdir: Path) -> None:
    """Write loss.png, if a step was logged."""
    _save(figures.loss(records.rows(workdir / 'metrics.jsonl')), workdir / 'loss.png')


def draw_prototypes(workdir: Path, found: Features, source: Source) -> None:
    """Write prototypes.png: the largest prototypes with their nearest images of `source`."""
    _save(figures.prototypes(found, source), workdir / 'prototypes.png')


def write(
    workdir: Path,
    found: Features,
    source: Source,
    crops: Sequence[Sequence[np.ndarray]] = (),
    images: int | None = None,
) -> list[str]:
    """Write report.html and map.png from the run's log, features of `source`, and `gallery.crops`.

    `images` is the number of training images, if it is known.

    Returns:
      What failed and is not on the page, with the reasons.
    """
    missing = _Missing()
    rows, events = (
        missing.without(name, lambda name=name: records.rows(workdir / name), [])
        for name in ('metrics.jsonl', 'events.jsonl')
    )
    summary, config = (
        missing.without(name, lambda name=name: records.read(workdir / name), {})
        for name in ('summary.json', 'config.json')
    )
    summary = records.numbers(summary)
    about = missing.without('the settings of config.json', lambda: page.about_run(config), {})
    recipe = missing.without(
        'the reference curves', lambda: reference.read(config.get('recipe', ''))
    )
    scatter = missing.without('the map', lambda: figures.embeddings(found, source))
    missing.without('map.png', lambda: _save(scatter, workdir / 'map.png'))
    sections = {
        name: missing.without(f'the {name}', make)
        for name, make in (
            ('diagnosis', lambda: page.diagnose(rows, events, summary, config, recipe, images)),
            ('curves', lambda: page.curves(rows, events, about, recipe)),
            ('prototypes', lambda: page.prototypes(found, source)),
            ('map', lambda: page.embeddings(scatter, found)),
            ('neighbours', lambda: page.neighbors(found, source)),
            ('crops', lambda: page.crops(crops)),
            ('settings', lambda: records.settings(config)),
        )
    }
    text = templates.render(
        'report.html',
        title=workdir.resolve().name,
        subtitle=page.subtitle(about, summary, found),
        tiles=page.tiles(summary, events),
        labelled=found.labels is not None,
        **sections,
    )
    with files.replacing(workdir / 'report.html') as path:
        path.write_text(text, encoding='utf-8')
    return list(missing)


def write_tensorboard(workdir: Path, found: Features, source: Source, step: int) -> None:
    """Add images of the prototypes and a projector of embeddings to the run's TensorBoard."""
    if (workdir / 'tensorboard' / f'{step:05}').exists():  # by an earlier call
        return
    # As many thumbnails as fill a square: tensorboardX leaves the rest of it unset.
    chosen = gallery.spread(found, math.isqrt(len(gallery.spread(found))) ** 2)
    if not len(chosen) or found.embeddings is None:
        return
    with contextlib.closing(TensorBoard(workdir / 'tensorboard')) as board:
        for place, item in enumerate(gallery.prototypes(found, source, most=30, images=10)):
            strip = np.concatenate([gallery.thumbnail(source, i) for i in item['nearest']], axis=1)
            board.image(f'prototypes/{place:02}', strip, step)
        board.flush()
    # Embeddings are in files of their own.
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


def _save(figure: Figure | None, path: Path) -> None:
    """Write a figure; without one, delete an older one that could be taken for it."""
    if figure is None:
        path.unlink(missing_ok=True)
        return
    with files.replacing(path) as temporary:
        figures.write(figure, temporary, dpi=120, format='png')
