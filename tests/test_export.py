"""From a run's checkpoint to PyTorch and back, and the script that evaluates there."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from test_models import model_config, shapes, zeros
from test_torch_weights import SMALL_HEAD, assert_same, load

from swav_jax import commands, config, export, models, torch_weights
from swav_jax.errors import UserError
from swav_jax.evaluate import knn
from swav_jax.runs.checkpoint import Checkpoints

TRUNK = dict(depth=18, width_multiplier=0.125, stem='small')
SCRIPT = Path(__file__).parents[1] / 'scripts' / 'evaluate_torch.py'


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('evaluate_torch', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Folder of a run, its network, and the variables at each of its steps."""
    workdir = tmp_path_factory.mktemp('run')
    settings = config.default()
    settings.model = model_config(TRUNK, SMALL_HEAD | dict(activation_name='none'))
    net = models.build(settings.model, channels=1)
    structure = shapes(net, channels=1)
    leaves, tree = jax.tree.flatten(structure)
    variables = {}
    with contextlib.closing(Checkpoints(workdir / 'checkpoints')) as checkpoints:
        for step in (10, 20):
            rng = np.random.default_rng(step)
            values = [rng.uniform(0.01, 0.2, leaf.shape).astype(np.float32) for leaf in leaves]
            variables[step] = jax.tree.unflatten(tree, values)
            state = jax.device_put(variables[step] | {'momentum': np.ones(3, np.float32)})
            checkpoints.save(step, state, {'config': config.to_dict(settings)})
    return workdir, net, variables


@pytest.mark.parametrize('layout', ['vissl', 'swav'])
@pytest.mark.parametrize('file_format', torch_weights.FORMATS)
def test_export_of_the_newest_step(run, layout, file_format, tmp_path, capsys):
    workdir, _, variables = run
    out = tmp_path / 'new folder' / f'weights.{file_format}'
    arguments = ['--workdir', workdir, '--out', out, '--layout', layout, '--format', file_format]
    assert commands.main(['export', *map(str, arguments)]) == 0
    assert f'trunk, head and prototypes of step 20, 130 tensors, layout {layout}' in (
        capsys.readouterr().out
    )
    assert_same(load(zeros(variables[20]), out), variables[20])
    # The head has no activations, which would take places between its layers.
    assert any('projection_head.2.weight' in name for name in torch_weights.read(out))


def test_export_of_a_step(run, tmp_path):
    workdir, _, variables = run
    export.export(workdir, tmp_path / 'a.pth', step=10)
    loaded = load(zeros(variables[10]), tmp_path / 'a.pth')
    assert_same(loaded['params']['trunk'], variables[10]['params']['trunk'])


def test_a_run_starts_from_another(run):
    workdir, _, variables = run
    assert_same(load(zeros(variables[20]), workdir), variables[20])
    wider = zeros(shapes(models.build(model_config(TRUNK | dict(width_multiplier=0.25)))))
    with pytest.raises(UserError, match='is not of this trunk'):
        load(wider, workdir)


def test_mistakes_are_one_line_and_nothing_is_written(run, tmp_path, capsys):
    workdir, out = str(run[0]), tmp_path / 'a.pth'
    for arguments, message in (
        (['--workdir', str(tmp_path)], 'holds no checkpoints: name the folder of a run'),
        (['--workdir', workdir, '--step', '7'], 'does not hold a checkpoint of step 7'),
    ):
        assert commands.main(['export', *arguments, '--out', str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count('\n') == 1
    assert not list(tmp_path.iterdir())
    assert (
        commands.main(['export', '--workdir', workdir, '--out', str(out), '--layout', 'timm']) == 2
    )
    assert "--layout: invalid choice: 'timm'" in capsys.readouterr().err
    with pytest.raises(UserError, match='does not hold checkpoints'):
        torch_weights.read(tmp_path)


def test_script_computes_our_features_and_our_accuracy(run, script, tmp_path):
    workdir, net, variables = run
    export.export(workdir, tmp_path / 'a.pth')
    model = script.load_trunk(tmp_path / 'a.pth', 'resnet18')
    rng = np.random.default_rng(0)
    images = rng.standard_normal((40, 28, 28, 1)).astype(np.float32)
    labels = rng.integers(0, 3, 40)
    ours = jax.jit(lambda v, x: net.apply(v, x, method='features'))(variables[20], images)
    data = torch.utils.data.TensorDataset(
        torch.from_numpy(np.moveaxis(images, -1, 1).copy()), torch.from_numpy(labels)
    )
    theirs, _ = script.features(model, data, 'cpu', workers=0)
    unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    np.testing.assert_allclose(theirs.numpy(), unit, atol=1e-6)

    x = rng.standard_normal((300, 8)).astype(np.float32)
    y = rng.integers(0, 5, 300)
    unit = torch.nn.functional.normalize(torch.from_numpy(x))
    train, test = ((unit[part], torch.from_numpy(y[part])) for part in (np.s_[:200], np.s_[200:]))
    expected = knn.accuracy(x[:200], y[:200], x[200:], y[200:], k=7, temperature=0.1)
    assert script.knn_top1(train, test, 7, 0.1) == expected


def test_script_refuses_weights_of_another_network(run, script, tmp_path, monkeypatch):
    export.export(run[0], tmp_path / 'a.pth')
    arguments = ['evaluate_torch.py', str(tmp_path / 'a.pth'), '--arch', 'resnet50']
    monkeypatch.setattr(sys, 'argv', arguments)
    with pytest.raises(SystemExit, match=r'error: .* in loading state_dict for ResNet'):
        script.main()
    monkeypatch.setattr(sys, 'argv', [arguments[0], str(tmp_path / 'none.pth')])
    with pytest.raises(SystemExit, match=r'error: .*none\.pth'):
        script.main()


def test_script_matches_classes_by_name(script, tmp_path, capsys):
    """A class that only one side has moves the numbers of those behind it."""
    for name in ('train/cat', 'train/cow', 'train/dog', 'val/cow', 'val/dog', 'val/emu'):
        (tmp_path / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / name / 'a.png')
    train, val = script.open_data(str(tmp_path))
    assert [val[i][1] for i in range(len(val))] == [1, 2]
    assert '1 images of val are left out' in capsys.readouterr().err
    assert len(train) == 3
