r"""What the network sees: a picture of images, the boxes of their crops, and the finished crops.

    python -m swav_jax.commands.preview --config FILE [--config.SETTING=VALUE ...] \
        [--output preview.png] [--images 6]

One row an image. On the left the image as it was decoded, with a box for each crop; on the right
the crops as the network gets them, in the order of the boxes, their normalisation undone. These
are the crops of the first images of a run with this config, to the pixel.
"""

if __name__ == '__main__':  # before the imports: TensorFlow reads its settings as it is imported
    from swav_jax import commands

    commands.run('preview')

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib import colormaps
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from ml_collections import ConfigDict

from swav_jax import atomic, augment, cli, methods
from swav_jax import config as settings
from swav_jax.data import pipeline, sources
from swav_jax.errors import UserError
from swav_jax.evaluate import figures
from swav_jax.terminal import printable


def main(argv: Sequence[str]) -> int:
    """Draw what the command line names; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = cli.Parser(__doc__, changes=True)
    parser.add_argument('--config', required=True, help='file of settings, as configs/demo.py')
    parser.add_argument('--output', type=_picture, default=Path('preview.png'))
    parser.add_argument('--images', type=cli.integer(1, 1000), default=6)
    found = parser.parse(argv)
    draw(cli.read_config(found.config, found.changes), found.output, found.images)
    print(found.output)


def _picture(text: str) -> Path:
    """A file that a figure can be written to; a PNG where its name has no ending."""
    path = cli.new_file(text)
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f'={text}: must end in one of .{", .".join(known)}')
    return path


def draw(config: ConfigDict, path: Path, images: int) -> None:
    """Write the picture of the first `images` images of a run to `path`, whole or not at all.

    Raises:
      UserError: a setting or the data cannot work, or `path` cannot be written.
    """
    settings.validate(config)
    methods.make(config).check()
    data = config.data
    source = sources.open_source(data.source, limit=data.limit, channels=data.channels)
    images = min(images, len(source))
    batches = pipeline.train_batches(
        source, data, seed=config.seed, global_batch=images, first_step=0
    )
    batch = next(batches)
    render = functools.partial(
        augment.multi_crop, seed=config.seed, data=data, augment=config.augment
    )
    groups = jax.jit(render)(batch)
    crops = [
        np.asarray(crop)
        for group, count in zip(groups, data.num_crops, strict=True)
        for crop in group.reshape(count, images, *group.shape[1:])
    ]
    titles = [
        f'{size}×{size}\n{low:.0%} – {high:.0%} of the area'
        for size, count, (low, high) in zip(
            data.size_crops, data.num_crops, data.crop_scales, strict=True
        )
        for _ in range(count)
    ]
    figure = contact_sheet(source, batch, crops, titles, data)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as temporary, temporary.open('wb') as file:
            figures.write(figure, file, dpi=100, format=path.suffix[1:].lower() or 'png')
    except OSError as error:
        raise UserError(f'--output={path} cannot be written ({error.strerror})') from error


def contact_sheet(
    source: sources.Source,
    batch: pipeline.Batch,
    crops: Sequence[np.ndarray],
    titles: Sequence[str],
    data: ConfigDict,
) -> Figure:
    """One row for each image of the batch; `crops` holds (rows, size, size, channels) for each."""
    rows, columns = len(batch['image']), len(crops) + 1
    colours = [colormaps['tab10'](i % 10) for i in range(len(crops))]
    figure = Figure(figsize=(1.5 * columns + 1, 1.6 * rows + 0.5), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, width_ratios=[1.6] + [1] * len(crops))
    for row in range(rows):
        height, width = batch['size'][row]
        picture = axes[row, 0]
        picture.imshow(viewable(batch['image'][row, :height, :width] / 255))
        for (y, x, box_height, box_width), colour in zip(batch['boxes'][row], colours, strict=True):
            corner = (x - 0.5, y - 0.5)  # pixel centres are at whole numbers
            picture.add_patch(
                Rectangle(corner, box_width, box_height, fill=False, color=colour, linewidth=1.5)
            )
        name = source.name(batch['index'][row]).rpartition('/')[2]
        note = name if batch['weight'][row] else f'{name}: unreadable'
        picture.set_xlabel(printable(note)[-28:], fontsize=7, parse_math=False)
        for crop, axis, colour in zip(crops, axes[row, 1:], colours, strict=True):
            axis.imshow(viewable(crop[row] * np.array(data.std) + np.array(data.mean)))
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2)
    for axis, title in zip(axes[0, 1:], titles, strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure


def viewable(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) in [0, 1]; of images with other than three channels the first, in gray."""
    image = image.clip(0, 1)
    return image if image.shape[-1] == 3 else image[..., :1].repeat(3, -1)
