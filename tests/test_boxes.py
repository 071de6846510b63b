"""Boxes against torchvision's distribution and its fallback."""

import numpy as np
import pytest
import scipy.stats
import torch
import torchvision

import tensorflow as tf  # isort: skip  (late: torchvision crashes if TensorFlow is there already)

from swav_jax.data import boxes


def our_boxes(height, width, scale, count=20_000):
    draws = boxes.draw(3, 1, np.arange(count // 20), 20)
    sizes = tf.tile([[height, width]], [count // 20, 1])
    found = boxes.random_resized(draws, sizes, np.tile(np.array([scale]), (20, 1)))
    return found.numpy().reshape(-1, 4)


@pytest.mark.parametrize(
    'height, width, scale',
    [
        (375, 500, (0.14, 1.0)),
        (375, 500, (0.05, 0.14)),
        (300, 90, (0.3, 1.0)),
        (28, 28, (0.2, 0.4)),
    ],
)
def test_boxes_follow_torchvisions_distribution(height, width, scale):
    ours = our_boxes(height, width, scale)
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array(
        [
            torchvision.transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
            for _ in range(20_000)
        ]
    )
    for name, of in {
        'y': lambda box: box[:, 0],
        'x': lambda box: box[:, 1],
        'height': lambda box: box[:, 2],
        'width': lambda box: box[:, 3],
        'area': lambda box: box[:, 2] * box[:, 3],
        'aspect': lambda box: box[:, 3] / box[:, 2],
        'y relative': lambda box: (box[:, 0] + 0.5) / (height - box[:, 2] + 1),
        'right': lambda box: box[:, 1] + box[:, 3],
    }.items():
        assert scipy.stats.ks_2samp(of(ours), of(theirs)).pvalue > 1e-4, name
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()


@pytest.mark.parametrize('height, width', [(20, 20_000), (20_000, 20), (1, 1), (4, 3), (1000, 700)])
def test_boxes_fall_back_to_torchvisions_centre(height, width):
    # No box of 2,000 times the area fits, so all tries fail.
    expected = torchvision.transforms.RandomResizedCrop.get_params(
        torch.empty(1, height, width), (2000.0, 2000.0), (3 / 4, 4 / 3)
    )
    ours = our_boxes(height, width, (2000.0, 2000.0), count=20)
    np.testing.assert_array_equal(ours, np.tile(expected, (20, 1)))


def test_box_draws_of_crops_positions_epochs_and_seeds_are_unrelated():
    places = ((0, 0, [0, 1]), (0, 0, [2, 3]), (0, 1, [0, 1]), (1, 0, [0, 1]))
    draws = [boxes.draw(seed, epoch, np.array(where), 4) for seed, epoch, where in places]
    assert len(np.unique(draws)) == np.size(draws)
    apart = boxes.draw(0, 0, np.array([3, 1, 2, 0]), 4)
    np.testing.assert_array_equal(apart, np.concatenate(draws[:2])[[3, 1, 2, 0]])
    far = boxes.draw(2**31, 2**31, 2**31 + np.arange(2), 4)
    np.testing.assert_array_equal(boxes.draw(2**31, 2**31, 2**31 + np.array([1]), 4)[0], far[1])
