"""The images of a report: those of prototypes, nearest neighbours, and crops of training."""

import base64
import io
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from swav_jax import augment
from swav_jax.data import pillow, pipeline
from swav_jax.data.images import ArraySource, Source
from swav_jax.errors import printable
from swav_jax.evaluate import clusters, knn
from swav_jax.evaluate.extraction import Features

THUMBNAIL = 64  # pixels
MAPPED = 1000  # images in a map: about 5 seconds of a CPU core


def prototypes(found: Features, source: Source, *, most: int, images: int) -> list[dict[str, Any]]:
    """At most `most` prototypes of the first head that have images, largest first.

    Returns:
      For each: `prototype`, its number; `size`, the number of its readable images; `nearest`, the
      indices of the nearest ones, at most `images`; if some labels are known, `label` and `share`,
      the most frequent class among these and its share.
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
        known = [] if found.labels is None else found.labels[members]
        counts = np.bincount([label for label in known if label >= 0])
        if len(counts):
            label = int(counts.argmax())
            item['label'] = class_name(source, label)
            item['share'] = counts[label] / counts.sum()
        shown.append(item)
    return shown


def neighbors(found: Features, *, queries: int, images: int) -> list[tuple[int, np.ndarray]]:
    """Some images, spread over the classes, and their neighbours by trunk features, nearest first.

    Returns:
      `queries` pairs of an image's index and the indices of at most `images` neighbours; none if
      less than two images can be read.
    """
    usable = np.flatnonzero(found.readable)
    if len(usable) < 2:
        return []
    order = np.arange(len(usable))
    if found.labels is not None:
        order = np.argsort(found.labels[usable], kind='stable')
    chosen = order[(2 * np.arange(queries) + 1) * len(order) // (2 * queries)]
    k = min(images + 1, len(usable))
    _, index = knn.neighbors(found.trunk[usable], found.trunk[usable[chosen]], k=k)
    rows = [row[row != query][: k - 1] for query, row in zip(chosen, index, strict=True)]
    return [(int(usable[query]), usable[row]) for query, row in zip(chosen, rows, strict=True)]


def crops(source: Source, config: ConfigDict, *, images: int) -> list[list[np.ndarray]]:
    """The crops of the first images of a run, uint8 (S, S, channels) each."""
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    _, found = first_crops(source, config, images=min(images, len(source)))
    levels = [np.uint8(np.clip(np.rint(255 * (x * std + mean)), 0, 255)) for x in found]
    return [list(image) for image in zip(*levels, strict=True)]


def first_crops(
    source: Source, config: ConfigDict, *, images: int
) -> tuple[pipeline.Batch, list[np.ndarray]]:
    """The first images of a run as a batch, and each of their crops (images, S, S, channels)."""
    settings = {'seed': config.seed, 'data': config.data, 'augment': config.augment}
    batches = pipeline.train_batches(
        source, config.data, seed=config.seed, global_batch=images, first_step=0
    )
    batch = next(batches)
    groups = jax.jit(lambda batch: augment.multi_crop(batch, **settings))(batch)
    return batch, [
        crop
        for group in jax.device_get(groups)
        for crop in group.reshape(-1, images, *group.shape[1:])
    ]


def spread(found: Features, count: int = MAPPED) -> np.ndarray:
    """The indices of at most `count` readable images, evenly spread."""
    usable = np.flatnonzero(found.readable)
    count = min(count, len(usable))
    return usable[np.arange(count) * len(usable) // max(count, 1)]


def used(found: Features) -> int:
    """The number of prototypes of the first head that are the nearest one of a readable image."""
    return len(np.unique(clusters.assign(found.scores[0][found.readable])))


def class_name(source: Source, label: int) -> str:
    """The name of a label."""
    return printable(source.class_names[label]) if label >= 0 else 'unknown'


def thumbnail(source: Source, index: int, size: int = THUMBNAIL) -> np.ndarray:
    """The central square of an image, uint8 (size, size, 3); gray if it cannot be read."""
    if isinstance(source, ArraySource):
        image = source.read(index)
    else:
        whole = max(4 * size, 256)  # a larger image is cropped to its center
        image, _, _ = pillow.decode_with_pil(source, whole, 3, index, centre=(whole, whole))
    picture = as_picture(image)
    side = min(picture.size)
    left, upper = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, upper, left + side, upper + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def as_picture(image: np.ndarray) -> Image.Image:
    """An RGB picture of uint8 (H, W, channels); if not of 3 channels, the first one in gray."""
    return Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).convert('RGB')


def data_uri(image: np.ndarray | Image.Image) -> str:
    """An image as a data URI, as PNG or, if that is large, JPEG."""
    picture = image if isinstance(image, Image.Image) else as_picture(image)
    for kind, options in (('PNG', {'optimize': True}), ('JPEG', {'quality': 85})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        if file.tell() < 4096:
            break
    encoded = base64.b64encode(file.getvalue()).decode()
    return f'data:image/{kind.lower()};base64,{encoded}'
