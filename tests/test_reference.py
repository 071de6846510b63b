"""Reference curves: what a band is made of, and which runs lie inside."""

import json
import runpy
import sys

import numpy as np
import pytest
from commands import call
from processes import ROOT, TINY

from swav_jax.evaluate import reference

SCRIPT = runpy.run_path(str(ROOT / 'scripts' / 'reference.py'))


def write(workdir, height, epochs=3):
    """Logs of a run of 10 steps an epoch, and its curves' height."""
    workdir.mkdir()
    rows = [
        {'step': s, 'epoch': s / 10, 'loss': 3.0, 'loss_over_ln_k': height + (s % 10 == 5) * 0.1}
        for s in range(5, 10 * epochs + 1, 5)
    ]
    events = [{'step': 0, 'epoch': 0.0, 'knn_top1_untrained': 60.0, 'knn_top1_pixels': 80.0}]
    events += [{'step': 10, 'epoch': 1.0, 'knn_top1': 70.0 + 10 * height}]
    events += [{'step': 15, 'epoch': 1.5, 'knn_top1': 0.0}]
    for name, lines in (('metrics', rows), ('events', events)):
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (workdir / f'{name}.jsonl').write_text(text)
    return workdir


@pytest.fixture
def written(tmp_path):
    """A folder with the reference curves of runs of heights 0.6, 0.7 and 0.9."""
    heights = {3: 0.7, 5: 0.6, 8: 0.9}
    runs = [write(tmp_path / str(seed), height) for seed, height in heights.items()]
    config = {'seed': 3, 'recipe': 'x', 'loss': {'epsilon': 0.05}, 'checkpoint': {'keep': 1}}
    content = SCRIPT['summarize']('x', [3, 5, 8], runs, config, 'python …')
    (tmp_path / 'x.json').write_text(SCRIPT['text'](content))
    table = SCRIPT['table']([3, 5, 8], runs).splitlines()
    assert '| `loss_over_ln_k` | 0.75 | 0.65 | 0.95 | 0.75 | 0.65 to 0.95 |' in table
    return tmp_path


def test_a_band_is_the_range_of_the_seeds_at_each_epoch(written):
    found = reference.read('x', written)
    assert found.seeds == (3, 5, 8) and found.steps_per_epoch == 10 and 'jax' in found.machine
    loss = found.curves['loss_over_ln_k']
    # The mean of an epoch's two rows, one of which is 0.1 higher.
    np.testing.assert_allclose(loss, [[e, 0.65, 0.75, 0.95] for e in (1, 2, 3)])
    # The value before training is of epoch 0; that in the middle of an epoch has no place.
    np.testing.assert_allclose(found.curves['knn_top1'], [[0, 60, 60, 60], [1, 76, 77, 79]])
    assert set(found.curves) == {'loss_over_ln_k', 'knn_top1'}, 'pixels are no curve'
    assert 'seed' not in found.config


def test_only_whole_epochs_and_known_values_count():
    rows = [
        {'step': 5, 'epoch': 0.5, 'loss_over_ln_k': 1.0},
        {'step': 10, 'epoch': 1.0, 'loss_over_ln_k': None},
        {'step': 15, 'epoch': 1.5, 'loss_over_ln_k': 0.5, 'code_entropy': None},
        {'step': 16, 'loss_over_ln_k': 0.1},
    ]
    events = [{'step': 10, 'epoch': 1.0, 'nmi': None}, {'step': 10, 'nmi': 0.5}]
    assert reference.curves(rows, events) == {'loss_over_ln_k': {1.0: 1.0}}
    assert reference.curves([], []) == {}
    assert reference.curves([{'step': 1, 'epoch': 1e99, 'loss_over_ln_k': 1.0}], [])


def bands(low, high, epochs=10):
    curve = np.array([[e, low, (low + high) / 2, high] for e in range(1, epochs + 1)])
    return reference.Reference('x', '1', 'm', 'c', (0, 1), {}, 10, {'loss_over_ln_k': curve})


@pytest.mark.parametrize(
    ('values', 'said'),
    [
        ([0.8] * 10, 'inside the band'),
        ([0.88] * 10, 'inside the band'),  # by the margin, half of the band's width
        ([0.92] * 10, 'above the band'),
        ([0.72] * 10, 'inside the band'),
        ([0.68] * 10, 'below the band'),
        ([0.99, 0.99, *[0.8] * 8], 'inside the band'),  # a fifth may leave it
        ([0.8] * 5 + [0.99] * 5, 'above the band from epoch 6 on'),
        ([0.99, 0.99, 0.99, *[0.8] * 7], 'above the band at 3 of 10 epochs'),
        ([0.1] * 5 + [0.99] * 5, 'on both sides of the band'),
        ([0.99, 0.99], 'above the band'),  # a short run is judged where it was
    ],
)
def test_inside_and_outside(values, said):
    curve = {float(epoch): value for epoch, value in enumerate(values, 1)}
    (verdict,) = reference.compare(bands(0.75, 0.85), {'loss_over_ln_k': curve})
    assert str(verdict) == said
    assert (verdict.side == '') == (said == reference.INSIDE)


def test_seeds_that_agree_leave_some_room():
    for value, side in ((101.0, ''), (103.0, 'above'), (97.0, 'below')):
        (verdict,) = reference.compare(bands(100, 100), {'loss_over_ln_k': {1.0: value}})
        assert verdict.side == side


def test_what_a_run_lacks_is_not_judged():
    assert list(reference.compare(bands(1, 2), {})) == []
    assert list(reference.compare(bands(1, 2), {'loss_over_ln_k': {99.0: 1.0}})) == []


def test_other_settings_are_listed():
    ours = {
        'seed': 1,
        'loss': {'epsilon': 0.5, 'new': 1},
        'checkpoint': {'keep': 9},
        'train': {'max_steps': 3, 'per_crop_pass': True},
        'evaluate': {'k': 5, 'report': True},
    }
    theirs = {
        'loss': {'epsilon': 0.05, 'old': 1},
        'checkpoint': {'keep': 1},
        'train': {'max_steps': 0, 'per_crop_pass': False},
        'evaluate': {'k': 20, 'report': False},
    }
    recipe = reference.Reference('x', '1', 'm', 'c', (0,), theirs, 10, {})
    assert reference.differences(recipe, ours) == [
        ('config.loss.epsilon', '0.05', '0.5'),
        ('config.train.per_crop_pass', 'false', 'true'),
        ('config.evaluate.k', '20', '5'),
    ]


@pytest.mark.parametrize('name', ['', 'unknown', '../x', 'x/../x', '*', 'x' * 5000])
def test_a_recipe_without_curves_has_none(written, name):
    assert reference.read(name, written) is None


@pytest.mark.parametrize(
    'text',
    ['', '{', '[]', '{}', '{"curves": 3}', '[' * 5000, b'\xff', '{"curves": {"x": [[1, 2]]}}',
     '{"curves": {"x": [[1, 2, 3, NaN]]}}', '{"curves": {}, "seeds": 3}'],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path, text):
    (tmp_path / 'x.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="the reference curves of 'x' are damaged"):
        reference.read('x', tmp_path)


def test_the_files_of_the_package_can_be_read():
    for path in reference.FOLDER.glob('*.json'):
        found = reference.read(path.stem)
        assert found.recipe == path.stem and len(found.seeds) == 5
        assert {'loss_over_ln_k', 'active_prototypes', 'knn_top1'} <= set(found.curves)
        for points in found.curves.values():
            assert (np.diff(points[:, 1:]) >= 0).all(), 'lowest, median, highest'


@pytest.mark.slow
def test_the_command_writes_the_file_and_resumes(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['reference.py'])
    monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=1')
    words = ['tiny', f'--config={TINY}', '--seeds', '0', '1', f'--keep_runs={tmp_path}/runs']
    assert call('scripts/reference.py', *words, f'--out={tmp_path}/tiny.json') == 0
    found = reference.read('tiny', tmp_path)
    assert found.seeds == (0, 1) and found.steps_per_epoch == 8
    assert len(found.curves['loss_over_ln_k']) == 10
    assert (np.diff(found.curves['loss_over_ln_k'][:, [1, 3]]) > 0).all(), 'the seeds differ'
    first = (tmp_path / 'tiny.json').read_text()
    capfd.readouterr()
    assert call('scripts/reference.py', *words, f'--out={tmp_path}/again.json') == 0
    assert (tmp_path / 'again.json').read_text() == first
    assert capfd.readouterr().out.count(': finished') == 2
    (tmp_path / 'runs' / 'seed1' / 'config.json').write_text('{}')
    assert call('scripts/reference.py', *words, f'--out={tmp_path}/again.json') == 2
    assert 'seed1 is a run with other settings' in capfd.readouterr().err
