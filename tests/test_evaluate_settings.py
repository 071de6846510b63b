"""Settings that a command line changes for an evaluation, of a run and of PyTorch weights."""

import numpy as np
import pytest
from commands import call
from processes import TINY
from small_run import write_run

from swav_jax import cli, commands, export
from swav_jax.evaluate import command
from swav_jax.evaluate.model import load

SEEN = ['--train=synthetic:40x16', '--test=synthetic:20x16', '--k', '3']


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A folder with a run, and its weights in two layouts."""
    root = tmp_path_factory.mktemp('evaluated')
    write_run(root / 'run')
    for layout in ('torchvision', 'swav'):
        export.export(root / 'run', root / f'{layout}.pth', layout=layout)
    wide = cli.load_config(TINY)
    assert wide.model.trunk.depth == 1
    return root


def loaded(*flags):
    return command.load(commands.parse('knn', flags))


def dtype(model):
    return np.dtype(model.net.trunk.conv.keywords['dtype'])


def test_precision_and_network_are_changed_before_weights_are_loaded(root):
    weights = [f'--weights={root}/torchvision.pth', f'--config={TINY}']
    assert dtype(loaded(*weights)) == 'float32'
    model = loaded(*weights, '--config.precision=bfloat16', '--config.data.source=')
    assert dtype(model) == 'bfloat16' and not model.config.data.source
    assert dtype(loaded(f'--workdir={root}/run', '--config.precision=bfloat16')) == 'bfloat16'
    small = [*weights[:1], f'--config={root}/other.py']
    text = (
        'import runpy\n\n\ndef get_config():\n'
        f'    c = runpy.run_path({TINY!r})["get_config"]()\n'
        '    c.model.trunk.group_width = 2\n    return c\n'
    )
    (root / 'other.py').write_text(text)
    assert loaded(*small, '--config.model.trunk.group_width=4').config.model.trunk.group_width == 4
    head = loaded(f'--weights={root}/swav.pth', f'--config={TINY}')
    assert head.has_head and head.variables['params']['head']['prototypes0']['kernel'].shape[1] == 5
    assert load(root / 'run', changes=[('config.evaluate.size', '8')]).config.evaluate.size == 8


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ('--workdir=RUN --config.model.head.num_clusters=(7,)', 'checkpoint of step 3 has'),
        ('--workdir=RUN --config.model.head.dims=(0,16,4)', 'checkpoint of step 3 has'),
        ('--workdir=RUN --config.model.trunk.depth=2', 'checkpoint of step 3 has'),
        ('--workdir=RUN --config.model.trunk.w_0=16', 'checkpoint of step 3 has'),
        ('--workdir=RUN --config.model.trunk.name=resnet50', 'config.model.trunk'),
        ('--workdir=RUN --config.precision=float8', 'config.precision'),
        ('--workdir=RUN --step=4', 'step 4'),
        ('--workdir=RUN --config.evaluate.sise=4', 'nearest one is --config.evaluate.size'),
        ('--weights=PTH --config=TINY --config.model.trunk.w_0=16', 'torchvision.pth'),
        ('--weights=PTH --config=TINY --config.precision=float8', 'config.precision'),
        ('--weights=PTH --config=TINY:word', "'word'"),
        ('--weights=PTH', 'torchvision.pth'),
    ],
)
def test_another_network_than_the_weights_is_one_line(flags, message, root, capsys):
    for name, value in (('RUN', root / 'run'), ('PTH', root / 'torchvision.pth'), ('TINY', TINY)):
        flags = flags.replace(name, str(value))
    assert call('swav_jax.evaluate.knn', *flags.split(), *SEEN) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and message in error


def test_weights_are_evaluated_with_a_config_that_names_no_data(root, capsys):
    """As README says: `--weights FILE` with a `--config`, and any source of images."""
    flags = [f'--weights={root}/torchvision.pth', f'--config={TINY}', '--config.data.source=']
    assert call('swav_jax.evaluate.knn', *flags, *SEEN) == 0
    assert 'k = 3 ' in capsys.readouterr().out
