"""Training batches of small sources, for the tests of the input."""

import itertools

from swav_jax.config import default
from swav_jax.data import pipeline, sources


def settings(canvas=28, channels=1):
    data = default().data
    data.update(canvas_size=canvas, channels=channels, num_crops=(2, 3))
    return data


def first_batches(source, count, *, data=None, seed=0, global_batch=8, first_step=0, **kwargs):
    batches = pipeline.train_batches(
        source,
        data or settings(),
        seed=seed,
        global_batch=global_batch,
        first_step=first_step,
        **kwargs,
    )
    return list(itertools.islice(batches, count))


def demo(limit=0):
    return sources.open_source('demo', limit=limit, channels=1)


def evaluated(source, channels, canvas):
    """(canvas, height and width of the picture, weight) by number, as evaluation has them."""
    found = {}
    for batch in pipeline.eval_batches(
        source, canvas_size=canvas, channels=channels, resize=32, size=32, batch_size=7
    ):
        for index, image, size, weight in zip(
            *(batch[key] for key in ('index', 'image', 'size', 'weight')), strict=True
        ):
            if index >= 0:
                assert index not in found
                found[int(index)] = image, tuple(size.tolist()), weight
    assert len(found) == len(source)
    return found
