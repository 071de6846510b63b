"""Evaluations during a run: by name, with and without labels, and beside raw pixels."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from small_run import random_variables
from small_training import build, small_config, state_of

from swav_jax import config as settings
from swav_jax.data import sources
from swav_jax.errors import UserError
from swav_jax.evaluate import extraction, logistic, online
from swav_jax.parallel.mesh import make_mesh

ALL = tuple(online.EVALUATIONS)


@pytest.fixture(scope='module')
def config():
    c = small_config()
    c.data.source, c.data.canvas_size = 'synthetic:48x16', 16
    c.evaluate.size = c.evaluate.resize = 16
    c.evaluate.batch_size, c.evaluate.k = 16, 3
    c.evaluate.online = ALL
    return c.lock()


@pytest.fixture(scope='module')
def state(config):
    return state_of(random_variables(build(config), 16, 3))


@pytest.fixture
def evaluation(config, tmp_path):
    """Makes the evaluations of a run with changed settings."""

    def make(labels=True, **changes):
        c = config.copy_and_resolve_references().unlock()
        c.evaluate.update(changes)
        if labels:
            c.evaluate.train_source, c.evaluate.test_source = 'demo:test', 'demo:test'
            c.data.channels, c.data.mean, c.data.std = 1, (0.3,), (0.3,)
        return online.OnlineEvaluation(c, build(c), make_mesh(c.model.sync_bn), tmp_path)

    return make


def test_names_of_settings_are_those_of_the_evaluations():
    """The table of settings cannot import them."""
    assert set(settings.settings.ONLINE) == set(online.EVALUATIONS)


def test_without_labels_those_run_that_need_none(evaluation, state):
    found = evaluation(labels=False).run(state)
    assert found.keys() == {
        'rankme', 'rankme_embeddings', 'alignment', 'uniformity',
        'prototypes_in_use', 'prototypes_empty', 'prototypes_near_duplicates',
    }  # fmt: skip
    assert found['prototypes_in_use'] + found['prototypes_empty'] == 6
    assert evaluation(labels=False, online=('knn', 'nmi')).run(None) == {}, 'nothing is extracted'
    assert evaluation(labels=False).run_on_pixels() == {}


def test_alignment_needs_two_crops_of_the_largest_size(evaluation, state):
    one = evaluation(labels=False, online=('alignment',))
    assert 0 < one.run(state)['alignment'] < 4
    with one.config.unlocked():
        one.config.data.num_crops = (1, 2)
    assert one.run(state).keys() == {'uniformity'}


def test_a_single_image_has_no_uniformity(evaluation, state):
    """A mean over no pairs would be NaN; crops of images that cannot be read say nothing."""
    made = evaluation(labels=False, online=('alignment', 'rankme'))
    made.test = made.test.take([0])
    assert made.run(state).keys() == {'alignment', 'rankme', 'rankme_embeddings'}
    seen = online.Seen(
        test=types.SimpleNamespace(embeddings=np.eye(3), readable=np.array([True, False, False]))
    )
    assert made.evaluations[0].run(seen) == {}


def test_only_what_is_judged_is_computed(evaluation, state, monkeypatch):
    """Scores of ImageNet for 3,000 prototypes take 15 GB."""
    asked = []
    extract = extraction.extract

    def spy(*args, of_head, **kwargs):
        found = extract(*args, of_head=of_head, **kwargs)
        assert set(found.arrays()) - {'trunk', 'labels', 'readable', 'embeddings'} == set()
        assert (found.embeddings is None) == ('embeddings' not in of_head)
        assert len(found.nearest) == ('nearest' in of_head)
        asked.append(set(of_head))
        return found

    monkeypatch.setattr(extraction, 'extract', spy)
    for names, expected in (
        (('rankme',), [{'embeddings'}]),
        (('prototypes',), [{'nearest'}]),
    ):
        asked.clear()
        evaluation(labels=False, online=names).run(state)
        assert asked == expected


def test_nearest_prototypes_are_those_of_the_scores(evaluation, state, config):
    source = sources.open_source('synthetic:48x16', channels=3)
    net = build(config)
    variables = state.variables('network')
    found = extraction.extract(
        net, variables, source, config, of_head=('embeddings', 'scores', 'nearest')
    )
    assert found.nearest[0].dtype == np.int32
    np.testing.assert_array_equal(found.nearest[0], found.scores[0].argmax(1))


def test_pixels_are_judged_like_features(evaluation):
    """Against scikit-learn's neighbours of the images themselves, in [0, 1], not normalised."""
    made = evaluation(online=('knn', 'linear', 'nmi'), k=1)
    with made.config.unlocked():
        made.config.data.canvas_size = 28  # the evaluation sees 16 pixels
    every_second = made.pair.train.take(range(0, 2000, 2))
    made.pair = dataclasses.replace(made.pair, train=every_second)
    found = made.run_on_pixels()
    assert found.keys() == {'knn_top1_pixels', 'linear_top1_pixels'}
    images = np.stack([made.test.read(i) for i in range(len(made.test))]).reshape(2000, -1) / 255
    unit = images / np.linalg.norm(images, axis=1, keepdims=True)
    nearest = np.argmax(unit @ unit[::2].T, axis=1)
    right = made.test.labels[::2][nearest] == made.test.labels
    assert found['knn_top1_pixels'] == pytest.approx(100 * right.mean(), abs=0.2)
    assert found['linear_top1_pixels'] > 80, 'half of the images are among those learned'


def test_large_images_are_judged_at_64_pixels(config):
    c = config.copy_and_resolve_references().unlock()
    c.data.canvas_size, c.evaluate.size, c.evaluate.resize = 256, 128, 160
    found = extraction.pixels(sources.open_source('synthetic:8x200', channels=3), c)
    assert found.trunk.shape == (8, 64 * 64 * 3)
    assert found.trunk.min() >= 0 and found.trunk.max() <= 1


def test_linear_probe_is_logistic_regression_of_standardised_features():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 4, 600)  # some of unknown class
    x = (rng.normal(size=(600, 10)) + 0.7 * np.eye(10)[labels]) * 10.0 ** np.arange(-5, 5) + 3
    train, test = slice(400), slice(400, 600)
    ours = logistic.accuracy(x[train], labels[train], x[test], labels[test])
    known = labels >= 0
    fit, judged = known & (np.arange(600) < 400), known & (np.arange(600) >= 400)
    scaler = StandardScaler().fit(x[fit])
    theirs = LogisticRegression(max_iter=1000).fit(scaler.transform(x[fit]), labels[fit])
    expected = 100 * theirs.score(scaler.transform(x[judged]), labels[judged])
    assert ours == pytest.approx(expected, abs=0.7), 'one image of 160'


def test_a_run_in_float64_has_the_same_linear_probe():
    """Its optimizer computes in float32, whatever JAX's default is."""
    x = np.random.default_rng(0).normal(size=(80, 6))
    labels = (x[:, 0] + x[:, 1] > 0).astype(int)
    expected = logistic.accuracy(x, labels, x, labels)
    with jax.enable_x64(True):
        assert logistic.accuracy(x, labels, x, labels) == expected


def test_a_feature_that_is_constant_does_not_count(evaluation):
    x = np.random.default_rng(0).normal(size=(50, 4))
    labels = (x[:, 0] > 0).astype(int)
    x[:, 3] = 1e4
    assert logistic.accuracy(x, labels, x, labels) > 95


def test_prototypes_are_counted_on_the_images_to_learn_from(evaluation, state, config):
    """With labels the whole train source, an epoch, and not the few images of the test source."""
    made = evaluation(labels=False, online=('prototypes',))
    seen = online.Seen(
        test=types.SimpleNamespace(nearest=(np.zeros(5, int),), readable=np.ones(5, bool)),
        train=types.SimpleNamespace(
            nearest=(np.array([0, 1, 2, 3]),), readable=np.array([True, True, True, False])
        ),
        prototypes=(np.eye(6),),
    )
    (judge,) = made.evaluations
    assert judge.run(seen) == {
        'prototypes_in_use': 3, 'prototypes_empty': 3, 'prototypes_near_duplicates': 0,
    }  # fmt: skip


def test_prototypes_of_a_state_are_rows(config, state):
    (found,) = online._prototypes(state, 'network')
    kernel = state.params['head']['prototypes0']['kernel']
    np.testing.assert_allclose(found, kernel.T, rtol=1e-6)


def test_an_unknown_evaluation_is_refused():
    c = settings.default()
    c.evaluate.online = ('knn', 'accuracy')
    with pytest.raises(UserError, match=r'config\.evaluate\.online\[1\].*knn, linear, nmi'):
        settings.validate(c)
