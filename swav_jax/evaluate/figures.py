"""Figures of runs: curves, prototypes and maps, without pyplot's global state.

Names from the data are drawn as they are, not read as mathematics.
"""

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from swav_jax.data.images import Source

if TYPE_CHECKING:  # it imports JAX, which curves do not need
    from swav_jax.evaluate.extraction import Features

_LONGEST = 20  # letters of a name
BLUE, ORANGE, GRAY = '#2563a8', '#c2571a', '#6b7280'
# Of curves over each other: colours, and lengths of dashes and gaps in widths of the line.
_COLORS = (BLUE, ORANGE, '#2e8b57', '#8e44ad', '#d6224f', '#1aa5b8', '#8a7000', '#1f2937')
_DASHES = ((), (4, 1.5), (1, 1.2), (6, 1.5, 1, 1.5))
_MOST_POINTS = 300  # of a curve over others

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl or events.jsonl, with finite values


def loss(rows: Rows) -> Figure | None:
    """The loss with ln K over the epochs, above the learning rate; None without a loss."""
    rows = [row for row in rows if {'epoch', 'loss'} <= row.keys()]
    if not rows:
        return None
    figure = Figure(figsize=(8, 5), layout='constrained')
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    known = ln_k(rows)
    label = known and f'ln K = {known:.2f}: all prototypes alike'
    _curve(top, *_points(rows, 'loss'), known, label)
    top.set_ylabel('swapped-prediction loss')
    top.set_title(f'Loss over {rows[-1].get("step", len(rows)):,} steps', loc='left')
    rates = _points(rows, 'lr')
    bottom.plot(*rates, color=ORANGE, linewidth=1.6)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel('learning rate')
    bottom.set_xlabel('epoch')
    _plain(bottom)
    return figure


def ln_k(rows: Rows) -> float | None:
    """The loss of a network to which all images look alike; None if no row has it."""
    both = ((row.get('loss'), row.get('loss_over_ln_k')) for row in rows)
    return next((value / share for value, share in both if value and share), None)


def _points(rows: Rows, name: str) -> np.ndarray:
    """Epochs and values (2, n) of the rows that have both."""
    known = [(row['epoch'], row[name]) for row in rows if {'epoch', name} <= row.keys()]
    return np.array(known, float).reshape(-1, 2).T


def metric(
    rows: Rows,
    name: str,
    title: str,
    reference: float | None = None,
    label: str = '',
    band: np.ndarray | None = None,
) -> Figure | None:
    """A small figure of one number over the epochs; None if no row has it.

    `reference` is the height of a dashed line, with `label` on it; `band` (epochs, 4) has epoch,
    lowest, median and highest value of other runs, which are drawn behind.
    """
    epochs, values = _points(rows, name)
    if not len(values):
        return None
    figure = Figure(figsize=(4.6, 2.7), layout='constrained')
    axes = figure.subplots()
    _curve(axes, epochs, values, reference, label, band)
    axes.set_title(title, loc='left', fontsize=11, parse_math=False)
    axes.set_xlabel('epoch')
    return figure


def line_style(place: int) -> tuple[str, tuple[float, ...]]:
    """Colour and dashes of one of several curves, by its place: 32 of them are different."""
    turn, color = divmod(place, len(_COLORS))
    return _COLORS[color], _DASHES[turn % len(_DASHES)]


def compared(
    runs: Sequence[Rows], name: str, title: str, reference: float | None = None, label: str = ''
) -> Figure | None:
    """A small figure of one number of several runs; None if no run has it.

    Each run has the `line_style` of its place, and a dot where it ends; the first line is the
    widest, so that equal curves do not hide each other. Long curves are drawn as means of their
    neighbouring points. `reference` and `label` are those of `metric`.
    """
    curves = [_points(rows, name) for rows in runs]
    if not any(points.size for points in curves):
        return None
    figure = Figure(figsize=(4.6, 2.9), layout='constrained')
    axes = figure.subplots()
    if reference is not None:
        _reference(axes, reference, label)
    widths = np.linspace(2.0, 1.3, len(curves))
    for place, (points, width) in enumerate(zip(curves, widths, strict=True)):
        (color, dashes), (x, y) = line_style(place), _means(points)
        axes.plot(x, y, color=color, linestyle=(0, dashes), linewidth=width)
        axes.plot(x[-1:], y[-1:], 'o', color=color, markersize=3.5)
    axes.set_title(title, loc='left', fontsize=11, parse_math=False)
    axes.set_xlabel('epoch')
    _plain(axes)
    return figure


def _means(points: np.ndarray) -> np.ndarray:
    """Points (2, n) in their order, averaged so that few enough are left to draw."""
    if points.shape[1] <= _MOST_POINTS:
        return points
    parts = np.array_split(points[:, :-1], _MOST_POINTS - 1, axis=1)
    return np.stack([*(part.mean(1) for part in parts), points[:, -1]], axis=1)


def prototypes(
    found: 'Features', source: Source, *, most: int = 30, images: int = 10
) -> Figure | None:
    """The first head's largest prototypes, each with its size, main class and nearest images.

    None if no image can be read or the network has no prototypes.
    """
    from swav_jax.evaluate import gallery  # imports JAX

    shown = gallery.prototypes(found, source, most=most, images=images) if found.scores else []
    if not shown:
        return None
    columns = 2 if len(shown) > 5 else 1
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(8.2 * columns, 0.6 + 0.7 * lines), layout='constrained')
    figure.suptitle(
        f'{gallery.used(found)} of {found.scores[0].shape[1]} prototypes are nearest to some of '
        f'{np.count_nonzero(found.readable):,} images; the {len(shown)} largest, each with its '
        'nearest images',
        x=0.01,
        ha='left',
        fontsize=11,
    )
    grid = figure.add_gridspec(lines, columns, wspace=0.03)
    for place, prototype in enumerate(shown):
        axes = figure.add_subplot(grid[place % lines, place // lines])
        _strip(axes, source, prototype, images)
    return figure


def _strip(axes: Any, source: Source, prototype: Mapping[str, Any], images: int) -> None:
    """Draw one prototype: size and class on the left, its nearest images on the right."""
    from swav_jax.evaluate import gallery  # imports JAX

    side, margin = gallery.THUMBNAIL, 110
    step = side + 4
    strip = np.full((side, margin + images * step, 3), 255, np.uint8)
    for place, index in enumerate(prototype['nearest']):
        left = margin + place * step
        strip[:, left : left + side] = gallery.thumbnail(source, index)
    axes.imshow(strip, interpolation='none')
    axes.set_axis_off()
    style = dict(x=margin - 10, ha='right', va='center', parse_math=False)
    axes.text(y=18, s=f'{prototype["size"]:,}', fontsize=10, weight='bold', **style)
    if 'label' in prototype:
        text = f'{_short(prototype["label"])}\n{prototype["share"]:.0%}'
        axes.text(y=46, s=text, fontsize=7, color=GRAY, **style)


def embeddings(found: 'Features', source: Source) -> Figure | None:
    """A map of embeddings, coloured by class or, if there are many classes, by prototype.

    None if there are no embeddings, or too few.
    """
    from swav_jax.evaluate import clusters, gallery  # these import JAX

    chosen = gallery.spread(found)
    if found.embeddings is None or len(chosen) < 4:
        return None
    points = tsne(found.embeddings[chosen])
    if few_classes(found):
        names = [gallery.class_name(source, i) for i in range(found.labels.max() + 1)]
        return point_map(points, found.labels[chosen], names)
    return point_map(points, clusters.assign(found.scores[0][chosen]), None)


def few_classes(found: 'Features') -> bool:
    """Whether there is a colour for each class."""
    return found.labels is not None and found.labels.max() < 20


def tsne(x: np.ndarray) -> np.ndarray:
    """Map at least 4 points (N, D) to (N, 2) by t-SNE, the same for the same points."""
    from sklearn.manifold import TSNE  # takes seconds to import
    from threadpoolctl import threadpool_limits

    if not np.ptp(x, axis=0).any():  # equal points have no principal axes
        return np.zeros((len(x), 2), np.float32)
    reduce = TSNE(init='pca', perplexity=min(30, len(x) / 3), random_state=0)
    with threadpool_limits(1):  # sums of several threads depend on their timing
        return reduce.fit_transform(x)


def point_map(points: np.ndarray, groups: np.ndarray, names: Sequence[str] | None) -> Figure:
    """Draw points (N, 2) in the colours of their groups (N,), with a legend if these have names.

    Group -1 is unknown, and gray.
    """
    colors = matplotlib.colormaps['tab10' if groups.max() < 10 else 'tab20']
    figure = Figure(
        figsize=(5.5, 5.5), layout='constrained'
    )  # so that names can be read on a phone
    axes = figure.subplots()
    drawn, labels = [], []
    for group in np.unique(groups):
        x, y = points[groups == group].T
        color = colors(group % colors.N) if group >= 0 else GRAY
        drawn.append(axes.scatter(x, y, s=9, color=color, linewidths=0))
        if names:
            labels.append(_short(names[group]) if group >= 0 else 'unknown')
    axes.set_aspect('equal', 'datalim')
    axes.set_axis_off()
    if names:
        # Texts are set afterwards because a legend omits labels that begin with an underscore.
        legend = figure.legend(
            drawn,
            ['?'] * len(drawn),
            loc='outside lower center',
            ncols=3,
            frameon=False,
            markerscale=2,
            fontsize=10,
        )
        for text, name in zip(legend.get_texts(), labels, strict=True):
            text.set_parse_math(False)
            text.set_text(name)
    return figure


def write(figure: Figure, file: Any, **options: Any) -> None:
    """Save a figure; characters that its font lacks become boxes, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from')
        figure.savefig(file, **options)


def svg(figure: Figure) -> str:
    """A figure as the data URI of an SVG."""
    file = io.BytesIO()
    write(figure, file, format='svg', metadata={'Date': None})
    return f'data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}'


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f'{name[: _LONGEST - 1]}…'


def _curve(
    axes: Any,
    x: np.ndarray,
    y: np.ndarray,
    reference: float | None,
    label: str | None,
    band: np.ndarray | None = None,
) -> None:
    """Draw a line with its last value as text, a dashed reference line, and a band behind."""
    low, high = y.min(), y.max()
    if band is not None and len(band := band[band[:, 0] <= math.ceil(x.max())]):
        epochs, lowest, middle, highest = band.T
        axes.fill_between(epochs, lowest, highest, color=ORANGE, alpha=0.2, linewidth=0)
        axes.plot(epochs, middle, color=ORANGE, linewidth=0.8)
        low, high = min(low, lowest.min()), max(high, highest.max())
    if reference is not None:
        low, high = min(low, reference), max(high, reference)
        _reference(axes, reference, label)
    axes.plot(x, y, color=BLUE, linewidth=1.6, marker='o' if len(x) < 12 else None, markersize=4)
    axes.plot(x[-1:], y[-1:], 'o', color=BLUE, markersize=4)
    axes.annotate(
        f'{y[-1]:.3g}',
        (x[-1], y[-1]),
        xytext=(6, 0),
        textcoords='offset points',
        va='center',
        color=BLUE,
    )
    span = high - low or abs(high) or 1.0
    axes.set_ylim(low - 0.08 * span, high + 0.18 * span)
    axes.set_xlim(min(0.0, x.min()), 1.1 * max(x.max(), 0.0) or 1.0)  # room for the last value
    _plain(axes)


def _reference(axes: Any, height: float, label: str | None) -> None:
    """Draw a dashed line with a label on it."""
    axes.axhline(height, color=GRAY, linestyle='--', linewidth=1)
    axes.annotate(
        label,
        (0.85, height),
        xycoords=('axes fraction', 'data'),
        xytext=(0, 4),
        textcoords='offset points',
        ha='right',
        color=GRAY,
    )


def _plain(axes: Any) -> None:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='#e5e7eb', linewidth=0.8)
    axes.set_axisbelow(True)
