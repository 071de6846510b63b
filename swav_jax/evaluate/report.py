"""Pictures of a run: the loss over time, and the prototypes with the images nearest to them."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from PIL import Image

from swav_jax import atomic
from swav_jax.data.images import Source
from swav_jax.evaluate import clusters
from swav_jax.evaluate.features import Features
from swav_jax.monitor import read_rows

BLUE, ORANGE, GRAY = '#2563a8', '#c2571a', '#6b7280'
THUMBNAIL = 64  # pixels


def draw_loss(workdir: Path) -> None:
    """Write loss.png from metrics.jsonl: the loss and ln K, the learning rate beneath.

    Nothing is drawn for a run without a logged step.
    """
    rows = [row for row in read_rows(workdir / 'metrics.jsonl') if row['loss'] is not None]
    if not rows:
        return
    epochs, losses, rates = (
        np.array([row[key] for row in rows]) for key in ('epoch', 'loss', 'lr')
    )
    ln_k = rows[0]['loss'] / rows[0]['loss_over_ln_k']

    figure = Figure(figsize=(8, 5), layout='constrained')
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.axhline(ln_k, color=GRAY, linestyle='--', linewidth=1)
    top.annotate(
        f'ln K = {ln_k:.2f}: all prototypes alike',
        (1, ln_k),
        xycoords=('axes fraction', 'data'),
        xytext=(-40, 4),
        textcoords='offset points',
        ha='right',
        color=GRAY,
    )
    top.plot(epochs, losses, color=BLUE, linewidth=1.6)
    top.plot(epochs[-1:], losses[-1:], 'o', color=BLUE, markersize=4)
    top.annotate(
        f'{losses[-1]:.2f}',
        (epochs[-1], losses[-1]),
        xytext=(6, 0),
        textcoords='offset points',
        va='center',
        color=BLUE,
    )
    top.set_ylabel('swapped-prediction loss')
    low, high = min(losses.min(), ln_k), max(losses.max(), ln_k)
    top.set_ylim(low - 0.06 * (high - low), high + 0.12 * (high - low))
    bottom.plot(epochs, rates, color=ORANGE, linewidth=1.6)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel('learning rate')
    bottom.set_xlabel('epoch')
    top.set_xlim(0, 1.06 * epochs[-1])  # room for the last value
    for axes in (top, bottom):
        _plain(axes)
    top.set_title(f'Loss over {rows[-1]["step"]:,} steps', loc='left')
    _save(figure, workdir / 'loss.png')


def draw_prototypes(
    workdir: Path, found: Features, source: Source, *, most: int = 30, images: int = 10
) -> None:
    """Write prototypes.png: the first head's largest prototypes, each with its nearest images.

    Args:
      workdir: the run's folder.
      found: features of `source`.
      source: the images.
      most: how many prototypes to show.
      images: how many images of each.
    """
    shown = gallery(found, source, most=most, images=images)
    used = np.count_nonzero(clusters.sizes(clusters.assign(found.scores[0]), 1))
    columns = 2 if len(shown) > 5 else 1
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(8.2 * columns, 0.6 + 0.7 * lines), layout='constrained')
    figure.suptitle(
        f'{used} of {found.scores[0].shape[1]} prototypes are nearest to some of {len(found):,} '
        f'images; the {len(shown)} largest, each with its nearest images',
        x=0.01,
        ha='left',
        fontsize=11,
    )
    grid = GridSpec(lines, columns, figure=figure, wspace=0.03)
    for place, prototype in enumerate(shown):
        axes = figure.add_subplot(grid[place % lines, place // lines])
        _draw_strip(axes, source, prototype, images)
    _save(figure, workdir / 'prototypes.png')


def gallery(found: Features, source: Source, *, most: int, images: int) -> list[dict[str, Any]]:
    """The largest prototypes of the first head, largest first.

    Args:
      found: features of `source`.
      source: the images.
      most: how many prototypes at most; those without an image are left out.
      images: how many images of each.

    Returns:
      For each: `prototype`, its number; `size`, how many images it has; `nearest`, the numbers of
      its nearest ones; where there are labels, `label` and `share`, the most frequent class among
      all its images and that class's share.
    """
    scores = found.scores[0]
    assignments = np.where(found.readable, clusters.assign(scores), -1)
    sizes = clusters.sizes(assignments[found.readable], scores.shape[1])
    shown = []
    for prototype in np.argsort(-sizes, kind='stable')[:most]:
        members = np.flatnonzero(assignments == prototype)
        if not len(members):
            break
        nearest = members[np.argsort(-scores[members, prototype], kind='stable')[:images]]
        item = {'prototype': int(prototype), 'size': len(members), 'nearest': nearest}
        if found.labels is not None:
            counts = np.bincount(found.labels[members])
            label = int(counts.argmax())
            item['label'] = source.class_names[label] if source.class_names else f'class {label}'
            item['share'] = counts[label] / len(members)
        shown.append(item)
    return shown


def thumbnail(source: Source, index: int, size: int = THUMBNAIL) -> np.ndarray:
    """The middle square of an image, uint8 (size, size, 3)."""
    image = source.read(index)
    if isinstance(image, bytes):
        image = Image.open(io.BytesIO(image))
    else:
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    image = image.convert('RGB')
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, upper, left + side, upper + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def _draw_strip(axes: Any, source: Source, prototype: Mapping[str, Any], images: int) -> None:
    """One prototype's line: what it is on the left, its nearest images on the right."""
    margin, step = 110, THUMBNAIL + 4
    strip = np.full((THUMBNAIL, margin + images * step, 3), 255, np.uint8)
    for place, index in enumerate(prototype['nearest']):
        left = margin + place * step
        strip[:, left : left + THUMBNAIL] = thumbnail(source, index)
    axes.imshow(strip, interpolation='none')
    axes.set_axis_off()
    style = dict(x=margin - 10, ha='right', va='center')
    axes.text(y=18, s=f'{prototype["size"]:,}', fontsize=10, weight='bold', **style)
    if 'label' in prototype:
        text = f'{prototype["label"][:20]}\n{prototype["share"]:.0%}'
        axes.text(y=46, s=text, fontsize=7, color=GRAY, **style)


def _plain(axes: Any) -> None:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='#e5e7eb', linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format='png')
