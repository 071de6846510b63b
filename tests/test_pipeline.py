"""Batches: their order, which process gets what, and what evaluation sees."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from batches import demo, first_batches, settings
from pictures import picture

from swav_jax.data import pipeline, sources
from swav_jax.errors import UserError


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_batch_has_the_agreed_shapes_and_the_images():
    source = demo()
    (batch,) = first_batches(source, 1)
    shapes = {key: (x.shape, x.dtype) for key, x in batch.items()}
    assert shapes == {
        'image': ((8, 28, 28, 1), np.uint8),
        'size': ((8, 2), np.int32),
        'boxes': ((8, 5, 4), np.float32),
        'weight': ((8,), np.float32),
        'epoch': ((8,), np.int32),
        'position': ((8,), np.int32),
        'index': ((8,), np.int32),
    }
    np.testing.assert_array_equal(batch['image'], source.images[batch['index']])
    assert (batch['weight'] == 1).all() and (batch['size'] == 28).all()
    y, x, height, width = np.moveaxis(batch['boxes'], -1, 0)
    assert (
        (y >= 0).all() and (y + height <= 28).all() and (x >= 0).all() and (x + width <= 28).all()
    )
    assert (height * width)[:, :2].mean() > 2 * (height * width)[:, 2:].mean()


def test_an_epoch_reads_each_image_once_and_drops_the_rest():
    source = demo(limit=45)
    batches = first_batches(source, 10)  # two epochs of five steps of eight
    for epoch in (0, 1):
        part = batches[5 * epoch : 5 * epoch + 5]
        assert np.concatenate([b['position'] for b in part]).tolist() == list(range(40))
        assert len({i for b in part for i in b['index'].tolist()}) == 40
        assert all((b['epoch'] == epoch).all() for b in part)
    orders = [np.concatenate([b['index'] for b in batches[i : i + 5]]) for i in (0, 5)]
    assert (orders[0] == orders[1]).mean() < 0.3


def test_orders_of_epochs_and_seeds_are_unrelated():
    count = 100_000
    orders = [pipeline.permutation(count, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(count))
    pairs = [*itertools.combinations(orders, 2), (orders[0], np.arange(count))]
    pairs.append((orders[0][1:], orders[0][:-1]))
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(count)


@pytest.mark.parametrize('processes', [2, 8])
def test_processes_split_the_same_batches(processes):
    source = demo()
    whole = first_batches(source, 3, first_step=1249)  # across the end of the first epoch
    parts = [
        first_batches(source, 3, first_step=1249, rows=rows)
        for rows in np.arange(8).reshape(processes, -1)
    ]
    for step in range(3):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in whole[step]}
        assert_same(joined, whole[step])


def test_rows_come_in_any_order():
    source, rows = demo(), np.array([6, 7, 2, 3])
    for part, whole in zip(
        first_batches(source, 2, first_step=1249, rows=rows),
        first_batches(source, 2, first_step=1249),
        strict=True,
    ):
        assert_same(part, {key: x[rows] for key, x in whole.items()})


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    source = folder_of_photos(tmp_path, 12)
    data = settings(canvas=64, channels=3)
    run = first_batches(source, 5, data=data, global_batch=4)
    for step in (0, 2, 4):
        assert_same(
            first_batches(source, 1, data=data, global_batch=4, first_step=step)[0], run[step]
        )
    (other,) = first_batches(source, 1, data=data, global_batch=4, seed=1)
    assert (other['boxes'] != run[0]['boxes']).mean() > 0.5
    # The draws belong to the position, not to the batch: a batch of other size has the same.
    (larger,) = first_batches(source, 1, data=data, global_batch=12)
    for key in ('index', 'boxes', 'image'):
        np.testing.assert_array_equal(larger[key][:4], run[0][key])


def test_starting_at_step_a_million_reads_only_its_batch(tmp_path):
    source = folder_of_photos(tmp_path, 8)
    reads = []
    read = type(source).read

    class Counting(sources.Source):
        labels = class_names = None

        def __len__(self):
            return 8

        def name(self, index):
            return str(index)

        def read(self, index):
            reads.append(index)
            return read(source, index)

    (batch,) = first_batches(Counting(), 1, data=settings(64, 3), first_step=10**6)
    assert (batch['epoch'] == 10**6).all() and len(reads) <= 8 * 64  # what is prefetched, no more


def test_batch_mistakes():
    with pytest.raises(UserError, match=r'5 images are fewer than the global batch of 8'):
        first_batches(demo(limit=5), 1)


def folder_of_photos(root, count, size=(40, 56)):
    for i in range(count):
        picture(*size, seed=i).save(root / f'{i:03d}.jpg')
    return sources.open_source(f'folder:{root}', channels=3)


def test_eval_batches_show_every_image_once_and_fill_the_last():
    source = demo(limit=10)
    batches = list(
        pipeline.eval_batches(source, canvas_size=28, channels=1, resize=28, size=28, batch_size=4)
    )
    assert [b['index'].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]]
    assert batches[2]['weight'].tolist() == [1, 1, 0, 0]
    assert (batches[2]['image'][2:] == 128).all()
    np.testing.assert_array_equal(batches[1]['boxes'], np.tile([0, 0, 28, 28], (4, 1, 1)))
    with pytest.raises(UserError, match=r'config\.evaluate\.size=32 is larger'):
        pipeline.eval_batches(source, canvas_size=28, channels=1, resize=28, size=32, batch_size=4)


def test_one_channel_sources_serve_three_channel_runs():
    source = sources.open_source('demo', limit=4, channels=3)
    (batch,) = pipeline.eval_batches(
        source, canvas_size=32, channels=3, resize=28, size=28, batch_size=4
    )
    np.testing.assert_array_equal(batch['image'][:, :28, :28], source.images.repeat(3, -1))


def test_sources_open_without_tensorflow():
    code = (
        'import sys; from swav_jax.data import sources; sources.open_source("demo", channels=1); '
        'assert not {"tensorflow", "torch", "jax", "scipy"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
