"""Evaluation agrees with scikit-learn where that computes the same, and is defined at the edges."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image
from sklearn import metrics
from sklearn.neighbors import KNeighborsClassifier
from small_run import random_variables

from configs import demo
from swav_jax import augment, models
from swav_jax.data import pipeline, sources
from swav_jax.data.images import ArraySource
from swav_jax.errors import UserError
from swav_jax.evaluate import clusters, extraction, knn
from swav_jax.parallel import mesh as meshes


def clouds(seed, rows, classes=7, dim=16):
    """Overlapping clouds: neighbours disagree, so that their weights decide."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    centres = np.random.default_rng(99).standard_normal((classes, dim))
    return (centres[labels] + 1.5 * rng.standard_normal((rows, dim))).astype(np.float32), labels


@pytest.mark.parametrize(('k', 'temperature'), [(1, 0.07), (20, 0.07), (200, 1.0)])
def test_knn_is_that_of_scikit_learn(k, temperature, monkeypatch):
    """Block sizes that divide nothing, fewer training rows in a block than k among them."""
    monkeypatch.setattr(knn, '_TEST_ROWS', 129)
    monkeypatch.setattr(knn, '_TRAIN_ROWS', 170)
    (train_x, train_y), (test_x, test_y) = clouds(0, 700), clouds(1, 301)
    theirs = KNeighborsClassifier(
        k, metric='cosine', weights=lambda d: np.exp((1 - d) / temperature)
    ).fit(train_x.astype(np.float64), train_y)
    expected = theirs.predict(test_x.astype(np.float64))
    actual = knn.classify(train_x, train_y, test_x, k=k, temperature=temperature, num_classes=7)
    np.testing.assert_array_equal(actual, expected)
    accuracy = knn.accuracy(train_x, train_y, test_x, test_y, k=k, temperature=temperature)
    assert accuracy == pytest.approx(100 * np.mean(expected == test_y))

    distance, _ = theirs.kneighbors(test_x.astype(np.float64))
    similarity, index = knn.neighbors(train_x, test_x, k=k)
    np.testing.assert_allclose(similarity, 1 - distance, atol=1e-6)
    exact = metrics.pairwise.cosine_similarity(train_x.astype(np.float64), test_x)
    np.testing.assert_allclose(np.take_along_axis(exact.T, index, 1), similarity, atol=1e-6)


def test_knn_at_the_edges():
    x, y = clouds(0, 10)
    with pytest.raises(UserError, match=r'config.evaluate.k=11 .* among 10 .* 1 to 10'):
        knn.classify(x, y, x, k=11, temperature=0.07, num_classes=7)
    assert (
        knn.accuracy(x, np.zeros(10, int), x[:3], np.zeros(3, int), k=10, temperature=0.07) == 100
    )
    same = np.ones((10, 4), np.float32)
    np.testing.assert_array_equal(
        knn.classify(same, y, same, k=10, temperature=1e-3, num_classes=7),
        np.full(10, np.bincount(y).argmax()),
        'as many equal neighbours as one likes, and weights beyond float32, are no trouble',
    )
    similarity, _ = knn.neighbors(np.zeros((3, 4), np.float32), same, k=3)
    assert not similarity.any()


@pytest.mark.parametrize(
    ('labels', 'assignments'),
    [
        (clouds(0, 500)[1], clouds(1, 500, classes=30)[1]),
        (clouds(0, 500)[1], clouds(0, 500)[1] + 5),  # the same partition with other names
        (np.arange(50), np.arange(50) // 7),
        (np.zeros(9, int), np.arange(9)),
        (np.zeros(9, int), np.ones(9, int)),
    ],
)
def test_nmi_is_that_of_scikit_learn(labels, assignments):
    expected = metrics.normalized_mutual_info_score(labels, assignments)
    assert clusters.nmi(labels, assignments) == pytest.approx(expected, abs=1e-12)


def test_clusters():
    scores = np.array([[1.0, 3.0, 2.0], [5.0, 4.0, 4.5], [0.0, 0.9, 0.0], [0.0, 0.9, 0.0]])
    assignments = clusters.assign(scores)
    assert assignments.tolist() == [1, 0, 1, 1]
    assert clusters.sizes(assignments, 4).tolist() == [1, 3, 0, 0]
    assert clusters.purity(np.array([7, 7, 7, 2]), assignments) == 0.75
    soft = clusters.soften(scores * 1000, 0.1)
    np.testing.assert_allclose(soft.sum(1), 1)
    np.testing.assert_allclose(
        clusters.soften(scores, 0.5)[1], np.exp([10, 8, 9]) / np.exp([10, 8, 9]).sum()
    )
    with pytest.raises(ValueError, match=r'inconsistent numbers of samples: \[3, 4\]'):
        clusters.nmi(np.zeros(3), assignments)


@pytest.fixture(scope='module')
def network():
    config = demo.get_config()
    net = models.build(
        config.model, channels=1, axis_names=('member',), mesh_axes=('group', 'member')
    )
    plain = models.build(config.model, channels=1)
    return net, random_variables(plain, 28, 1), config


def test_features_of_every_image_in_order(network):
    """A batch size that divides neither the images nor the devices changes nothing."""
    net, variables, config = network
    source = sources.open_source('demo:test', limit=37, channels=1)
    config.evaluate.batch_size = 10
    config.evaluate.size = config.evaluate.resize = 28  # not resized, so not rounded
    found = extraction.extract(net, variables, source, config)
    assert len(found) == 37
    assert found.readable.all()
    np.testing.assert_array_equal(found.labels, source.labels)

    (batch,) = pipeline.eval_batches(
        source, canvas_size=28, channels=1, resize=28, size=28, batch_size=37
    )
    images = augment.center_crop(batch, size=28, data=config.data)
    assert config.evaluate.feature_grid == 3
    trunk = jax.jit(lambda x: net.apply(variables, x, grid=3, method='features'))(images)
    embeddings, scores = jax.jit(lambda x: net.apply(variables, x, method='embed'))(images)
    np.testing.assert_allclose(found.trunk, trunk, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.embeddings, embeddings, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.scores[0], scores[0], rtol=1e-4, atol=1e-5)
    assert found.scores[0].shape == (37, 60)
    assert np.std(found.embeddings, 0).mean() > 0.001, 'the images differ'

    three = Mesh(np.array(jax.devices()[:3]).reshape(3, 1), meshes.AXES)
    again = extraction.extract(net, variables, source, config, three)
    np.testing.assert_allclose(again.trunk, found.trunk, rtol=1e-4, atol=1e-5)


def test_an_unreadable_image_keeps_its_place(network, tmp_path):
    net, variables, config = network
    demo_source = sources.open_source('demo:test', limit=3, channels=1)
    for i in range(3):
        Image.fromarray(demo_source.read(i)[..., 0]).save(tmp_path / f'{i}.png')
    (tmp_path / '1.png').write_bytes(b'not an image')
    source = sources.open_source(f'folder:{tmp_path}', channels=1)
    found = extraction.extract(net, variables, source, config)
    assert found.readable.tolist() == [True, False, True]
    assert found.labels is None


def test_images_smaller_than_the_crop_are_enlarged(network):
    net, variables, config = network
    images = np.random.default_rng(0).integers(0, 255, (3, 9, 5, 1), np.uint8)
    found = extraction.extract(net, variables, ArraySource('x', images), config)
    assert np.isfinite(found.trunk).all()
    assert np.std(found.embeddings, 0).mean() > 1e-4
