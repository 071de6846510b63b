"""The command lines and the Python calls of evaluation, on a small run and on exported weights."""

import csv
import json
import re
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from small_run import random_variables

from configs import demo
from swav_jax import commands, models, torch_weights
from swav_jax import config as settings
from swav_jax.config import saved
from swav_jax.errors import UserError
from swav_jax.evaluate import (
    classifier,
    clusters,
    knn,
    linear,
    logistic,
    semi,
)
from swav_jax.evaluate.classifier import Recipe
from swav_jax.evaluate.model import load, load_weights
from swav_jax.runs.checkpoint import Checkpoints


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """The folder of a run that stopped at step 3, with random weights."""
    workdir = tmp_path_factory.mktemp('run')
    config = demo.get_config()
    config.evaluate.feature_grid = 1
    config.evaluate.batch_size = 64
    net = models.build(config.model, channels=1)
    state = dict(random_variables(net, 28, 1)) | {'queue': np.zeros(3, np.float32)}
    state = jax.device_put(state)
    with closing(Checkpoints(workdir / 'checkpoints')) as checkpoints:
        checkpoints.save(3, state, {'config': settings.to_dict(config)})
    return workdir


def run(name, *argv):
    """The exit code of a command line."""
    return commands.main([name, *map(str, argv)])


def test_a_run_is_loaded_with_its_settings(workdir):
    model = load(workdir)
    config = demo.get_config()
    config.evaluate.feature_grid = 1
    config.evaluate.batch_size = 64
    assert settings.to_dict(model.config) == settings.to_dict(config)
    assert model.config.data.size_crops == (16, 10)
    assert (model.step, model.has_head) == (3, True)
    older = settings.to_dict(config)
    del older['evaluate']['k']
    assert saved.restore(older).evaluate.k == 20, 'a setting that the run did not have yet'


def test_embed_takes_arrays_and_files(workdir, tmp_path):
    model = load(workdir)
    found = model.extract('demo:test', progress=False)
    images = model.open('demo:test', limit=5)
    few = model.embed(images.images[..., 0])
    chosen = np.arange(5) * 2000 // 5
    np.testing.assert_allclose(few.embeddings, found.embeddings[chosen], atol=1e-5)
    for i, image in enumerate(images.images):
        Image.fromarray(image[..., 0]).save(tmp_path / f'{i}.png')
    files = model.embed([tmp_path / f'{i}.png' for i in range(5)] + [tmp_path / 'missing.png'])
    np.testing.assert_allclose(files.embeddings[:5], few.embeddings, atol=1e-5)
    assert files.readable.tolist() == [True] * 5 + [False]
    with pytest.raises(UserError, match=r'images are float64\[5, 28, 28, 1\]: give uint8'):
        model.embed(images.images / 255)


def test_the_readmes_lines_of_python(workdir, tmp_path, monkeypatch):
    """As they are written there, on the run of these tests and images that it has not seen."""
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs' / 'demo').symlink_to(workdir)
    text = (Path(__file__).parent.parent / 'README.md').read_text()
    (code,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    test = load(workdir).open('demo:test', limit=300)
    names = {'images': test.images}
    exec(code, names)
    assert np.mean(names['classes'] == test.labels) > 0.5
    assert names['prototypes'].shape == (300,) and names['prototypes'].max() < 60
    assert names['nearest'].shape == (300, 20) and np.all(np.diff(names['similarity']) <= 0)
    np.testing.assert_allclose(names['codes'].sum(-1), np.ones((1, 300)), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(names['found'].embeddings, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize('name', ['found.npz', 'found'])
def test_features_are_written(workdir, tmp_path, name):
    out = tmp_path / name
    code = run(
        'features',
        '--workdir',
        workdir,
        '--source=demo:test',
        '--limit=100',
        '--out',
        out,
    )
    assert code == 0
    if name.endswith('.npz'):
        arrays = dict(np.load(out))
    else:
        arrays = {path.stem: np.load(path, mmap_mode='r') for path in out.glob('[!.]*.npy')}
        assert not list(out.glob('.*'))
    shapes = {name: array.shape for name, array in arrays.items()}
    assert shapes == {
        'trunk': (100, 192),
        'embeddings': (100, 64),
        'scores0': (100, 60),
        'labels': (100,),
        'readable': (100,),
        'names': (100,),
    }
    expected = load(workdir).extract(load(workdir).open('demo:test', limit=100))
    np.testing.assert_allclose(arrays['trunk'], expected.trunk, atol=1e-5)
    assert arrays['names'][1] == 'demo:test[20]'


def test_clusters_are_written(workdir, tmp_path, capsys):
    (tmp_path / 'prototype_notes.txt').write_text("the user's own")
    argv = ('--workdir', workdir, '--source=demo:test', '--out', tmp_path)
    assert run('clusters', *argv, '--limit=400') == 0
    earlier = {path.name for path in tmp_path.glob('prototype_*.txt')}
    assert run('clusters', *argv, '--limit=200') == 0
    assert (tmp_path / 'prototype_notes.txt').read_text() == "the user's own"
    (tmp_path / 'prototype_notes.txt').unlink()
    assert earlier - {path.name for path in tmp_path.glob('prototype_*.txt')}, 'some are gone'
    model = load(workdir)
    found = model.extract(model.open('demo:test', limit=200))
    with (tmp_path / 'assignments.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row['prototype']) for row in rows] == found.scores[0].argmax(1).tolist()
    soft = np.load(tmp_path / 'soft.npy')
    np.testing.assert_allclose(soft, clusters.soften(found.scores[0], 0.1), atol=1e-5)
    lists = {path.name: path.read_text().split() for path in tmp_path.glob('prototype_*.txt')}
    listed = [name for names in lists.values() for name in names]
    assert sorted(listed) == sorted(row['name'] for row in rows)
    printed = capsys.readouterr().out
    assert f'NMI {clusters.nmi(found.labels, found.scores[0].argmax(1)):.4f}' in printed


def test_knn_prints_every_k(workdir, capsys):
    argv = ('--workdir', workdir, '--limit', 300, '--k', 5, 50)
    assert run('knn', *argv) == 0
    printed = capsys.readouterr().out
    model = load(workdir)
    train, test = model.open('demo', limit=300), model.open('demo:test', limit=300)
    x, y = model.extract(train).trunk, model.extract(test).trunk
    for k in (5, 50):
        top1 = knn.accuracy(x, train.labels, y, test.labels, k=k, temperature=0.07)
        assert f'k = {k:<4} top-1 {top1:.2f}%' in printed
    assert run('knn', '--workdir', workdir, '--limit', 300, '--k', 301) == 2
    assert 'k=301 neighbours cannot be found among 300' in capsys.readouterr().err


@pytest.mark.parametrize('c', [0.1, 10.0])
def test_logistic_is_scikit_learns(c):
    """Features of very different spreads, classes that overlap."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 1500)
    x = rng.standard_normal((7, 40))[labels] + 2 * rng.standard_normal((1500, 40))
    x = np.float32(x * np.geomspace(0.2, 3, 40) + 5)
    theirs = LogisticRegression(C=c, solver='newton-cg', max_iter=500, tol=1e-8)
    theirs.fit(np.float64(x[:1000]), labels[:1000])
    weights, bias = logistic.fit(x[:1000], labels[:1000], 7, c=c)
    np.testing.assert_allclose(weights.T, theirs.coef_, atol=0.02 * abs(theirs.coef_).max())
    same = (x[1000:] @ weights + bias).argmax(1) == theirs.predict(x[1000:])
    assert same.mean() > 0.99


def test_sgd_as_pytorch_documents_it():
    """Two epochs of two steps: the rate falls between them, Nesterov, decay on all but the norm."""
    rng = np.random.default_rng(0)
    kernel, gradients = rng.standard_normal((3, 4)), rng.standard_normal((4, 3, 4))
    recipe = Recipe(2, 0.5, milestones=(1,), gamma=0.2, weight_decay=0.1, nesterov=True)
    tx = classifier._optimizer(recipe, batch_size=64, steps_per_epoch=2)
    params = {'classifier': {'bn': {'scale': kernel}, 'linear': {'kernel': kernel}}}
    params = jax.tree.map(jax.numpy.float32, params)
    state = tx.init(params)
    expected, buffers = {'bn': kernel, 'linear': kernel}, {'bn': 0.0, 'linear': 0.0}
    for step, gradient in enumerate(gradients):
        grads = {'classifier': {'bn': {'scale': gradient}, 'linear': {'kernel': gradient}}}
        updates, state = tx.update(jax.tree.map(jax.numpy.float32, grads), state, params)
        params = jax.tree.map(jax.numpy.add, params, updates)
        learning_rate = 0.5 * 64 / 256 * (0.2 if step >= 2 else 1)
        for name, decay in (('bn', 0.0), ('linear', 0.1)):
            decayed = gradient + decay * expected[name]
            buffers[name] = 0.9 * buffers[name] + decayed
            expected[name] = expected[name] - learning_rate * (decayed + 0.9 * buffers[name])
    ours = params['classifier']
    np.testing.assert_allclose(ours['linear']['kernel'], expected['linear'], rtol=1e-4)
    np.testing.assert_allclose(ours['bn']['scale'], expected['bn'], rtol=1e-4)


@pytest.mark.slow
def test_the_probe_learns(workdir, tmp_path):
    """Nearly what logistic regression can reach on the same features."""
    model = load(workdir)
    train, test = model.open('demo', limit=2000), model.open('demo:test')
    recipe = Recipe(epochs=40, learning_rate=0.1, batch_norm=True)
    result = classifier.fit(model, train, test, recipe, tmp_path, crop_scale=None)
    best = linear.regress(model, train, test, c=1.0)
    assert best['top1'] - 3 < result['top1'] < best['top1'] + 3
    assert best['top1'] > 60
    assert result['top5'] > 95


@pytest.mark.slow
def test_an_interrupted_probe_goes_on_as_if_it_had_not_been(workdir, tmp_path, monkeypatch):
    model = load(workdir)
    train, test = model.open('demo', limit=128), model.open('demo:test', limit=64)
    recipe = Recipe(epochs=3, learning_rate=0.3, batch_size=64)
    whole = classifier.fit(model, train, test, recipe, tmp_path / 'whole')

    save = Checkpoints.save

    def save_and_stop(self, step, state, metadata):
        save(self, step, state, metadata)
        self.wait()
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, 'save', save_and_stop)
        classifier.fit(model, train, test, recipe, tmp_path / 'parts')
    assert classifier.fit(model, train, test, recipe, tmp_path / 'parts') == whole
    assert classifier.fit(model, train, test, recipe, tmp_path / 'parts') == whole, 'when done'
    with pytest.raises(UserError, match=r'parts holds a training with seed 0 instead of 1'):
        classifier.fit(model, train, test, recipe, tmp_path / 'parts', seed=1)


@pytest.mark.slow
def test_fine_tuning_moves_the_trunk_and_a_probe_does_not(workdir, tmp_path):
    model = load(workdir)
    before = jax.tree.map(np.array, model.variables)
    train = semi.take_share(model.open('demo'), 0.0064)
    np.testing.assert_array_equal(np.bincount(train.labels), [7, 6, 7, 6, 6, 7, 6, 7, 6, 6])
    test = model.open('demo:test', limit=64)
    for name, trunk_rate in (('probe', 0.0), ('tuned', 0.01)):
        recipe = Recipe(1, learning_rate=0.2, trunk_learning_rate=trunk_rate, milestones=(9,))
        classifier.fit(model, train, test, recipe, tmp_path / name)
    _, probe, _ = Checkpoints(tmp_path / 'probe' / 'checkpoints').read(('params', 'batch_stats'))
    _, tuned, _ = Checkpoints(tmp_path / 'tuned' / 'checkpoints').read(('params', 'batch_stats'))
    assert 'trunk' not in probe['params']
    for kind in ('params', 'batch_stats'):
        pairs = zip(
            jax.tree.leaves(tuned[kind]['trunk']),
            jax.tree.leaves(before[kind]['trunk']),
            strict=True,
        )
        assert all(np.any(np.asarray(a) != b) for a, b in pairs), kind
    for a, b in zip(jax.tree.leaves(model.variables), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


def test_learning_rates_follow_the_recipe():
    cosine, steps = Recipe(100, 0.3), Recipe(20, 5.0, milestones=(12, 16), gamma=0.2)
    assert [float(cosine.factor(e)) for e in (0, 50)] == pytest.approx([1, 0.5])
    expected = [0.2 ** ((e >= 12) + (e >= 16)) for e in range(20)]
    assert [float(steps.factor(e)) for e in range(20)] == pytest.approx(expected)


def test_the_probe_is_reported(workdir, tmp_path, capsys):
    argv = ('--workdir', workdir, '--limit=64', '--epochs=1', '--crop_scale', 'none')
    assert run('linear', *argv, '--out', tmp_path) == 0
    result = json.loads((tmp_path / 'result.json').read_text())
    assert f'top-1 {result["top1"]:.2f}%' in capsys.readouterr().out
    assert result['recipe']['epochs'] == 1
    assert result['recipe']['learning_rate'] == 0.3
    assert run('linear', *argv, '--preset=logistic', '--out', tmp_path / 'best') == 0
    assert json.loads((tmp_path / 'best' / 'result.json').read_text())['c'] == 1


def test_exported_weights_are_evaluated_like_the_run(workdir, tmp_path):
    model = load(workdir)
    state = torch_weights.to_torch(model.variables, 'vissl', model.net.trunk)
    torch_weights.write(tmp_path / 'all.pth', state)
    trunk = torch_weights.to_torch(model.variables, 'torchvision', model.net.trunk)
    torch_weights.write(tmp_path / 'trunk.safetensors', trunk, 'safetensors')
    source = model.open('demo:test', limit=50)
    expected = model.extract(source)
    whole = load_weights(tmp_path / 'all.pth', model.config)
    np.testing.assert_allclose(whole.extract(source).scores[0], expected.scores[0], atol=1e-5)
    trunk = load_weights(tmp_path / 'trunk.safetensors', model.config)
    found = trunk.extract(source)
    np.testing.assert_allclose(found.trunk, expected.trunk, atol=1e-5)
    assert (found.embeddings, found.scores) == (None, ())
    with pytest.raises(UserError, match='no prototypes'):
        trunk.need_head()


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['--workdir={none}'], 'holds no checkpoints'),
        (['--workdir={run}', '--step=9'], 'not hold a checkpoint of step 9, only of 3'),
        (['--workdir={run}', '--train={flat}'], '--train={flat} has no labels'),
        (['--workdir={run}', '--train=nonsense'], "'nonsense' is not a kind of source"),
        (['--workdir={run}', '--config.evaluate.sise=3'], '--config.evaluate.sise=3: '),
        (['--workdir={run}', '--config.evaluate.k=x'], '--config.evaluate.k=x: '),
        (
            ['--workdir={run}', '--config.evaluate.size=29'],
            'config.evaluate.size=29: must be at most',
        ),
        (['--workdir={run}', '--nonsense'], "'--nonsense' is not known"),
        (['--workdir={run}', '--epochs=0'], '--epochs=0: must be a whole number of 1 or more'),
        (['--workdir={run}', '--crop_scale', '2', '1'], '--crop_scale 2 1: give two numbers'),
        (['--weights=missing.pth', '--config=configs/demo.py'], 'missing.pth does not exist'),
        (['--weights=missing.pth', '--config=missing.py'], 'there is no such file'),
    ],
)
def test_the_users_mistakes(workdir, tmp_path, capsys, argv, message):
    Image.new('L', (28, 28)).save(tmp_path / 'a.png')
    places = {'run': workdir, 'none': tmp_path / 'none', 'flat': f'folder:{tmp_path}'}
    argv = [part.format(**places) for part in argv]
    code = run('linear', *argv, '--limit=64', '--out', tmp_path / 'out')
    error = capsys.readouterr().err.strip()
    assert (code, error.count('\n')) == (2, 0)
    assert message.format(**places) in error
