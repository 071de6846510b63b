"""Evaluation of images that do not fit: other classes, unreadable files, odd names, odd weights."""

import argparse
import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from small_run import random_variables
from small_training import build, small_config, state_of

from swav_jax.data import sources
from swav_jax.data.images import ArraySource
from swav_jax.errors import UserError
from swav_jax.evaluate import (
    classifier,
    clusters,
    command,
    extraction,
    features,
    knn,
    linear,
    report,
    semi,
)
from swav_jax.evaluate.classifier import Recipe
from swav_jax.evaluate.model import Model
from swav_jax.evaluate.online import OnlineEvaluation
from swav_jax.parallel.mesh import make_mesh

LEVELS = {'cat': (250, 10, 10), 'dog': (10, 250, 10), 'cow': (10, 10, 250)}


@pytest.fixture(scope='module')
def model():
    """One convolution and a head, of random weights: colours are told apart."""
    c = small_config()
    c.data.source, c.data.canvas_size, c.data.max_bad_fraction = 'synthetic:64x16', 16, 0.5
    c.evaluate.size = c.evaluate.resize = 16
    c.evaluate.batch_size = 8
    net = build(c)
    return Model(net, random_variables(net, 16, 3), c, 3, True, None)


def folder(root, **classes):
    """Class folders of images in the colour of their class: {name: (colour's class, number)}."""
    for name, (kind, count) in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.array(LEVELS[kind]) + i, 0, 255).astype(np.uint8)
            Image.fromarray(np.tile(pixels, (16, 16, 1))).save(root / name / f'{i}.png')
    return f'folder:{root}'


@pytest.fixture
def evaluate(model, monkeypatch, capsys):
    """Runs a command's main with a model; returns what it printed and what it said on stderr."""

    def run(module, model=model, **flags):
        monkeypatch.setattr(command, 'load', lambda arguments: model)
        usual = dict(
            train=None, test=None, source=None, out=None, workdir=None, limit=0, k=[1], head=0,
            features='trunk', epochs=1, learning_rate=0.1, batch_size=8, crop_scale=None,
            seed=0, preset='swav', c=1.0, share=1.0, trunk_learning_rate=None,
        )  # fmt: skip
        module.run(argparse.Namespace(**usual | flags))
        out, err = capsys.readouterr()
        return out, '\n'.join(line for line in err.splitlines() if line.startswith('note'))

    return run


def test_classes_that_only_one_side_has(evaluate, model, tmp_path):
    """The same in all that judges by labels: 100%, not 0%, of the images that can be judged."""
    train = folder(tmp_path / 'train', cat=('cat', 4), cow=('cow', 4), dog=('dog', 4))
    test = folder(tmp_path / 'test', cow=('cow', 2), dog=('dog', 2), emu=('cat', 1))
    out, said = evaluate(knn, train=train, test=test)
    assert '12 images vote on 4' in out and 'top-1 100.00%' in out
    assert '1 of 5 images are left out, of classes without images' in said and 'emu' in said
    assert 'has no images of classes of' in said and said.endswith(': cat')
    c = model.config.copy_and_resolve_references()
    c.evaluate.train_source, c.evaluate.test_source, c.evaluate.k = train, test, 1
    online = OnlineEvaluation(c, model.net, make_mesh(c.model.sync_bn), tmp_path)
    assert any('emu' in note for note in online.notes)
    assert online.run(state_of(model.variables))['knn_top1'] == 100
    assert len(online.test) == 5, 'all are shown'


def test_a_class_that_cannot_be_learned_is_left_out_of_the_test(evaluate, model, tmp_path):
    train = folder(tmp_path / 'train', ant=('cat', 1), cow=('cow', 4), dog=('dog', 4))
    test = folder(tmp_path / 'test', ant=('cat', 2), cow=('cow', 2), dog=('dog', 2))
    (tmp_path / 'train' / 'ant' / '0.png').write_bytes(b'no image')
    line = (
        'no image of ant in {}={} can be read: 2 of 6 images of {}={}, which are of these classes'
    )
    out, said = evaluate(knn, train=train, test=test)
    assert '8 images vote on 4' in out and 'top-1 100.00%' in out
    assert line.format('--train', train, '--test', test) in said
    c = model.config.copy_and_resolve_references()
    c.evaluate.train_source, c.evaluate.test_source, c.evaluate.k = train, test, 1
    online = OnlineEvaluation(c, model.net, make_mesh(c.model.sync_bn), tmp_path)
    names = ('config.evaluate.train_source', train, 'config.evaluate.test_source', test)
    assert any(line.format(*names) in note for note in online.notes)
    assert online.run(state_of(model.variables), print)['knn_top1'] == 100 and len(online.test) == 6
    with pytest.raises(UserError, match='--k=9 neighbours cannot be found among 8 labelled images'):
        evaluate(knn, train=train, test=test, k=[9])


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['swav', 'logistic'])
def test_a_classifier_of_classes_that_only_one_side_has(evaluate, tmp_path, preset):
    train = folder(tmp_path / 'train', cat=('cat', 4), cow=('cow', 4), dog=('dog', 4))
    test = folder(tmp_path / 'test', cow=('cow', 2), dog=('dog', 2), emu=('cat', 1))
    (tmp_path / 'test' / 'dog' / 'bad.png').write_bytes(b'no image')
    flags = dict(train=train, test=test, preset=preset, epochs=60, learning_rate=3.0)
    out, said = evaluate(linear, **flags, out=tmp_path / 'out')
    assert 'top-1 100.00%' in out
    assert '1 of 6 images are left out' in said and '1 of 5 images cannot be read' in said


@pytest.mark.parametrize(
    ('bad', 'allowed', 'said'),
    [
        (0, 0.0, None),
        (1, 0.1, '1 of 10 images cannot be read and do not count: x[0]'),
        (9, 0.9, 'x[0], x[1], x[2], x[3], x[4] and 4 more'),
        (1, 0.01, 'more than config.data.max_bad_fraction=0.01 allows: x[0]; repair'),
        (10, 1.0, 'none of 10 images can be read: x[0], x[1], x[2], x[3], x[4] and 5 more'),
    ],
)
def test_the_bound_on_unreadable_images(bad, allowed, said):
    source = ArraySource('x', np.zeros((10, 1, 1, 3), np.uint8))
    readable = np.arange(10) >= bad
    if allowed in (0.01, 1.0):
        with pytest.raises(UserError) as caught:
            extraction.check_readable(readable, source, allowed)
        assert said in str(caught.value)
    else:
        lines = extraction.check_readable(readable, source, allowed)
        assert said in lines[0] if said else lines == []


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_features_that_are_not_finite_are_named(value, monkeypatch):
    """Those of unreadable images may be so."""
    monkeypatch.setattr(extraction, '_CHECKED_ROWS', 3)
    x, readable = np.ones((8, 2), np.float32), np.arange(8) != 7
    found = extraction.Features(x, x.copy(), (x.copy(), x.copy()), None, readable)
    found.embeddings[7] = value
    assert extraction.not_finite(found) == []
    found.scores[1][6, 1] = value
    assert extraction.not_finite(found) == ['scores1']
    c = small_config(**{'data.max_bad_fraction': 0.5})
    with pytest.raises(UserError, match=r'not finite .scores1.: its weights are damaged'):
        extraction.check(found, ArraySource('x', np.zeros((8, 1, 1, 3), np.uint8)), c)


@pytest.mark.slow
def test_unreadable_images_are_left_out_counted_and_bounded(evaluate, model, tmp_path):
    train = folder(tmp_path / 'train', cat=('cat', 4), dog=('dog', 4))
    test = folder(tmp_path / 'test', cat=('cat', 2), dog=('dog', 2))
    bad = tmp_path / 'test' / 'cat' / 'bad\x1b[2J.png'
    bad.write_bytes(b'no image')
    (tmp_path / 'train' / 'dog' / 'bad.png').write_bytes(b'')

    def strict(fraction):
        c = model.config.copy_and_resolve_references()
        c.data.max_bad_fraction = fraction
        c.evaluate.train_source, c.evaluate.test_source, c.evaluate.k = train, test, 1
        return dataclasses.replace(model, config=c)

    here = dict(train=train, test=test)
    commands = [
        (knn, here),
        (clusters, {'source': test, 'out': tmp_path / 'c'}),
        (features, {'source': test, 'out': tmp_path / 'd'}),
    ]
    for module, flags in commands:
        out, said = evaluate(module, **flags)
        assert r'1 of 5 images cannot be read and do not count' in said
        assert r'bad\x1b[2J.png' in said
        assert 'top-1 100.00%' in out or 'top-1' not in out
        with pytest.raises(UserError, match=r'cannot be read, more than config\.data\.max_bad_f'):
            evaluate(module, strict(0.1), **flags | {'out': tmp_path / f'strict {module.__name__}'})
    with (tmp_path / 'c' / 'assignments.csv').open() as file:
        assert len(list(csv.DictReader(file))) == len(np.load(tmp_path / 'c' / 'soft.npy')) == 4
    assert np.load(tmp_path / 'd' / 'readable.npy').sum() == 4

    say = []
    online = OnlineEvaluation(
        strict(0.5).config, model.net, make_mesh({'enabled': False}), tmp_path
    )
    for _ in range(2):
        assert online.run(state_of(model.variables), say.append)['knn_top1'] == 100
    assert len(say) == 2, 'each line once'
    online.config = strict(0.1).config
    with pytest.raises(UserError, match=r'max_bad_fraction=0\.1 allows'):
        online.run(state_of(model.variables), say.append)

    for path in (tmp_path / 'test').rglob('*.png'):
        path.write_bytes(b'no image')
    for module, flags in commands:
        with pytest.raises(UserError, match='none of 5 images can be read'):
            evaluate(module, strict(1.0), **flags)


@pytest.mark.slow
def test_training_a_classifier_on_unreadable_images(evaluate, model, tmp_path):
    """With crops, which are read anew: they are listed and bounded, too."""
    train = folder(tmp_path / 'train', cat=('cat', 4), dog=('dog', 4))
    (tmp_path / 'train' / 'dog' / '0.png').write_bytes(b'')
    flags = dict(train=train, test=train, crop_scale=(0.5, 1.0), preset='vissl')
    _, said = evaluate(linear, **flags, out=tmp_path / 'out', epochs=2)
    assert said.count('cannot be read, does not count') == 1
    assert 'dog/0.png' in (tmp_path / 'out' / 'bad_images.txt').read_text()
    for path in (tmp_path / 'train').rglob('*.png'):
        path.write_bytes(b'no image')
    with pytest.raises(UserError, match='of 8 images can'):
        evaluate(linear, **flags, out=tmp_path / 'none')


@pytest.mark.slow
def test_weights_that_are_not_finite_are_refused(evaluate, model, tmp_path):
    test = folder(tmp_path / 'images', cat=('cat', 2), dog=('dog', 2))
    for value in (np.nan, np.float32(3e38)):
        variables = jax.tree.map(lambda x, v=value: np.full_like(x, v), model.variables)
        broken = dataclasses.replace(model, variables=variables)
        for module in (knn, clusters, features):
            with pytest.raises(UserError, match=r'not finite .*its weights are damaged'):
                evaluate(module, broken, train=test, test=test, source=test, out=tmp_path / 'out')
    c = model.config.copy_and_resolve_references()
    c.evaluate.train_source = c.evaluate.test_source = test
    c.evaluate.k = 1
    say = []
    online = OnlineEvaluation(c, model.net, make_mesh({'enabled': False}), tmp_path / 'run')
    assert online.run(state_of(broken.variables), say.append) == {}
    assert 'not finite' in say[0], 'the run goes on'


@pytest.mark.slow
def test_a_finished_classifier_is_taken_for_the_same_question_only(model, tmp_path):
    train = sources.open_source('synthetic:32x16', channels=3)
    recipe, out = Recipe(1, 0.1, batch_size=8), tmp_path / 'out'

    def fit(model=model, train=train, **options):
        return classifier.fit(model, train, train, recipe, out, crop_scale=None, **options)

    first = fit()
    assert fit() == first
    labels, names = train.labels, train.class_names
    other = model.config.copy_and_resolve_references()
    other.data.mean = (0.1, 0.2, 0.3)
    smaller = model.config.copy_and_resolve_references()
    smaller.evaluate.size = 8
    moved = jax.tree.map(lambda x: x, model.variables)
    kernel = moved['params']['trunk']['conv1']['kernel']
    moved['params']['trunk']['conv1']['kernel'] = np.array(kernel) + 1e-6
    for changes, what in (
        ({'train': train.relabel(labels[::-1].copy(), names)}, 'images_and_labels'),
        ({'train': train.relabel(labels, names[::-1])}, 'images_and_labels'),
        ({'train': train.take(np.arange(32)[::-1])}, 'images_and_labels'),
        ({'train': train.take(np.arange(31))}, 'images 32 instead of 31'),
        ({'model': dataclasses.replace(model, config=other)}, 'data .*mean'),
        ({'model': dataclasses.replace(model, config=smaller)}, 'evaluate .*size'),
        ({'model': dataclasses.replace(model, variables=moved)}, 'trunk_weights'),
        ({'seed': 1}, 'seed 0 instead of 1'),
    ):
        with pytest.raises(UserError, match=f'out holds a training with {what}'):
            fit(**changes)
    assert fit() == first


@pytest.mark.slow
def test_a_result_says_what_it_was_made_from(evaluate, tmp_path):
    for preset in ('swav', 'logistic'):
        made = []
        for test in ('synthetic:40x16', 'synthetic:50x16'):
            out = tmp_path / f'{preset} {len(made)}'
            evaluate(linear, train='synthetic:32x16', test=test, preset=preset, out=out)
            made.append(json.loads((out / 'result.json').read_text())['made_from'])
        assert made[0].pop('test_images') == 40
        assert made[0].pop('test_images_and_labels') != made[1].pop('test_images_and_labels')
        assert made[1].pop('test_images') == 50
        assert made[0] == made[1] and made[0]['images'] == 32


def test_unknown_labels_are_no_class(evaluate, model, tmp_path):
    """-1 in a list of images: not the last class, in votes, shares, NMI and outputs."""
    folder(tmp_path, cat=('cat', 4), dog=('dog', 4))
    paths = sorted(str(path) for path in tmp_path.rglob('*.png'))
    np.save(tmp_path / 'paths.npy', np.array(paths))
    np.save(tmp_path / 'labels.npy', np.array([5, 5, -1, -1, 2**40, 2**40, 2**40, -1]))
    spec = f'filelist:{tmp_path}/paths.npy?labels={tmp_path}/labels.npy'
    out, said = evaluate(knn, train=spec, test=spec)
    assert '5 images vote on 5' in out and '100.00%' in out
    assert said.count('3 of 8 images have no label') == 2
    (tmp_path / 'clusters').mkdir()
    (tmp_path / 'clusters' / 'prototype_999.txt').write_text("the user's own")
    out, said = evaluate(clusters, source=spec, out=tmp_path / 'clusters')
    assert '8 images, nearest' in out and '3 images without a label do not count' in said
    out, _ = evaluate(features, source=spec, out=tmp_path / 'f.npz')
    assert 'labels int64[8]\n' in out, 'as they are written'
    written = np.load(tmp_path / 'f.npz')['labels']
    assert written.tolist() == [5, 5, -1, -1, 2**40, 2**40, 2**40, -1]
    source = model.open(spec)
    assert (semi.take_share(source, 0.4).labels >= 0).all()
    found = model.extract(source)
    voted = knn.classify(
        found.trunk, found.labels, found.trunk, k=5, temperature=0.1, num_classes=2
    )
    assert set(voted) == {0, 1}
    votes = knn.vote(np.ones((1, 3)), np.array([[-1, -1, 0]]), temperature=1.0, num_classes=3)
    assert votes.tolist() == [0]
    with pytest.raises(UserError, match='among 5 labelled images'):
        knn.classify(found.trunk, found.labels, found.trunk, k=6, temperature=1.0, num_classes=2)


@pytest.mark.parametrize(
    ('module', 'flags', 'message'),
    [
        (clusters, {'head': 1}, '--head=1 is not there: use 0 to 0'),
        (clusters, {'head': -1}, '--head=-1 is not there'),
        (clusters, {'out': 'x.csv'}, '--out=.*x.csv is named as a file'),
        (features, {'out': 'feat.npy'}, '--out=.*feat.npy is named as a file'),
        (knn, {'k': [0]}, '--k=0 neighbours'),
        (knn, {'k': [1, 10**12]}, 'k=1000000000000 neighbours'),
        (linear, {'epochs': 10**12}, '1,000,000,000,000 epochs of 4 steps are too many'),
        (linear, {'train': 'synthetic:1x16'}, 'are of one class'),
        (linear, {'out': '/'}, '--out=/ is not a folder'),
    ],
)
def test_flags_that_cannot_be_meant_so(evaluate, tmp_path, module, flags, message):
    usual = dict.fromkeys(('train', 'test', 'source'), 'synthetic:32x16')
    out = {'out': tmp_path / flags.get('out', 'out')}
    with pytest.raises(UserError, match=message) as caught:
        evaluate(module, **usual | flags | out)
    assert '\n' not in str(caught.value)


def test_a_batch_that_no_machine_holds_is_refused(evaluate, model, monkeypatch, tmp_path):
    monkeypatch.setattr(linear, 'total_bytes', lambda: 10_000)
    with pytest.raises(UserError, match=r'--batch_size=32 .*: use at most 3'):
        evaluate(
            linear, train='synthetic:32x16', test='synthetic:32x16', out=tmp_path / 'out',
            batch_size=10**9, crop_scale=(0.5, 1.0),
        )  # fmt: skip


def test_train_source_needs_a_test_source(model, tmp_path):
    c = model.config.copy_and_resolve_references()
    c.evaluate.train_source = 'synthetic:32x16'
    with pytest.raises(UserError, match=r'config\.evaluate\.train_source=.* needs images to'):
        OnlineEvaluation(c, model.net, None, tmp_path)
    c.evaluate.train_source, c.evaluate.test_source = '', 'synthetic:32x16'
    online = OnlineEvaluation(c, model.net, None, tmp_path)
    assert online.run(None) == {} and len(online.test) == 32, 'images to show alone'


@pytest.mark.slow
def test_names_from_the_data_are_text(evaluate, model, tmp_path):
    """In lists, tables and pages; each name on one line."""
    name = '$x_{$ é 猫 <img src=x> [red]\x1b[2J\n\udcff'
    images = folder(tmp_path / 'data', **{name: ('cat', 3), '_b$': ('dog', 3)})
    evaluate(clusters, source=images, out=tmp_path / 'out')
    lines = [
        line
        for path in (tmp_path / 'out').glob('prototype_*.txt')
        for line in path.read_text(encoding='utf-8').splitlines()
    ]
    assert len(lines) == 6 and all('\x1b' not in line for line in lines)
    with (tmp_path / 'out' / 'assignments.csv').open(encoding='utf-8', newline='') as file:
        assert sorted(row['name'] for row in csv.DictReader(file)) == sorted(lines)
    source = model.open(images)
    found = model.extract(source)
    run = tmp_path / 'run\x1b&<'
    run.mkdir()
    assert report.write_all(run, found, source, source, model.config, 3)
    page = (run / 'report.html').read_text(encoding='utf-8')
    assert '<img src=x' not in page and '&lt;img src=x&gt; [red]\\x1b[2J\\n\\xff' in page
    assert '\x1b' not in page and '<title>run\\x1b&amp;&lt;</title>' in page
    (metadata,) = (run / 'tensorboard').glob('*/default/metadata.tsv')
    assert len(metadata.read_text(encoding='utf-8').splitlines()) == 4
