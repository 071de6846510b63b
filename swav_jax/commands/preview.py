r"""What the network sees: a picture of some images, the boxes of their crops, and the crops.

    python -m swav_jax.commands.preview --config FILE [--config.SETTING=VALUE ...] \
        [--output preview.png] [--images 6]

Each row shows an image: on the left as it was decoded, with a box for each crop; on the right the
crops in the order of the boxes, as the network sees them but not normalised. These are, to the
pixel, the crops of the first images of a run with this config.
"""

if __name__ == '__main__':  # before the imports, so that mistakes are reported without them
    from swav_jax import commands

    commands.run('preview')

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from ml_collections import ConfigDict

from swav_jax import cli, files, methods
from swav_jax import config as settings
from swav_jax.cli.flags import preview as parse_preview
from swav_jax.data import pipeline, sources
from swav_jax.errors import UserError, printable
from swav_jax.evaluate import figures, gallery


def run(flags: argparse.Namespace) -> None:
    """Draw the picture."""
    draw(flags.config, flags.output, flags.images)
    print(flags.output)


main = cli.command(__doc__, parse_preview, run)


def draw(config: ConfigDict, path: Path, images: int) -> None:
    """Draw the first `images` images of a run into the file `path`.

    Raises:
      UserError: a setting or the data cannot work, or `path` cannot be written.
    """
    settings.validate(config)
    methods.make(config).check()
    data = config.data
    source = sources.open_source(data.source, limit=data.limit, channels=data.channels)
    batch, crops = gallery.first_crops(source, config, images=min(images, len(source)))
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
        with files.replacing(path) as temporary, temporary.open('wb') as file:
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
    """Draw a row per image of the batch; `crops` holds a (rows, size, size, channels) each."""
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
    """An image as (H, W, 3) in [0, 1]; if it has not three channels, the first one in gray."""
    image = image.clip(0, 1)
    return image if image.shape[-1] == 3 else image[..., :1].repeat(3, -1)
