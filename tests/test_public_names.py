"""What `import swav_jax` gives, and that as a library it leaves the process as it is."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import swav_jax
from swav_jax import training

ROOT = Path(swav_jax.__file__).parent


def test_public_names_are_there_and_documented():
    assert set(swav_jax.__all__) >= {
        'load', 'load_weights', 'train', 'default_config', 'build_model', 'sinkhorn_codes',
        'swav_loss', 'scale_by_larc', 'Features',
    }  # fmt: skip
    assert dir(swav_jax) == sorted(['__version__', *swav_jax.__all__])
    for name in swav_jax.__all__:
        assert inspect.getdoc(getattr(swav_jax, name)), name
    assert swav_jax.train is training.run, 'no module of that name takes its place'
    assert not hasattr(swav_jax, 'nonsense')


def test_type_checkers_read_the_same_names():
    """The imports that they read name what is loaded; and the list is in order."""
    (block,) = (node for node in ast.parse((ROOT / '__init__.py').read_text()).body
                if isinstance(node, ast.If))  # fmt: skip
    told = {
        alias.asname or alias.name: f'{node.module}.{alias.name}'.removeprefix('swav_jax.')
        for node in block.body
        for alias in node.names
    }
    assert told == swav_jax._PLACES
    assert swav_jax.__all__ == sorted(told)
    assert (ROOT / 'py.typed').is_file()


def test_names_are_loaded_when_they_are_used():
    code = (
        'import sys, swav_jax\n'
        'assert not {"jax", "tensorflow", "numpy"} & sys.modules.keys()\n'
        'swav_jax.default_config(), swav_jax.UserError, dir(swav_jax)\n'
        'assert not {"jax", "tensorflow"} & sys.modules.keys()\n'
        'swav_jax.sinkhorn_codes, swav_jax.scale_by_larc, swav_jax.build_model\n'
        'assert not {"tensorflow", "orbax", "torch"} & sys.modules.keys()\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


# Of a process: what a library must not change. What jax, TensorFlow and others change when they
# are imported is theirs: they come first.
LIBRARY = """
import importlib, logging, os, pkgutil, signal, sys, threading, warnings

import absl.logging, flax.linen, jax, matplotlib.figure, numpy, optax, orbax.checkpoint, PIL.Image
import rich.progress, scipy, tensorboardX, tensorflow
from jax.experimental import multihost_utils

import swav_jax


def state():
    loggers = [logging.getLogger(name) for name in ('', 'absl', 'asyncio', 'jax', 'swav_jax')]
    return {
        'environment': dict(os.environ),
        'hooks': [sys.excepthook, sys.unraisablehook, threading.excepthook],
        'streams': [sys.stdout, sys.stderr],
        'warnings': list(warnings.filters),
        'loggers': [(x.level, list(x.filters), list(x.handlers)) for x in loggers],
        'signals': [signal.getsignal(s) for s in signal.valid_signals()],
        'masked': signal.pthread_sigmask(signal.SIG_BLOCK, []),
        'jax': dict(jax.config.values),
        'path': list(sys.path),
    }


before = state()
for module in pkgutil.walk_packages(swav_jax.__path__, 'swav_jax.'):
    importlib.import_module(module.name)


def unchanged(when):
    now = state()
    assert now == before, (when, [(k, before[k], now[k]) for k in now if now[k] != before[k]])


unchanged('imported')
from swav_jax.data import pipeline, sources
from swav_jax.runs.checkpoint import Checkpoints

checkpoints = Checkpoints(sys.argv[1])
checkpoints.latest_step()
checkpoints.close()
source = sources.open_source('synthetic:64x16', channels=3)
batches = pipeline.eval_batches(
    source, canvas_size=16, channels=3, resize=16, size=16, batch_size=8
)
next(batches)
unchanged('used')
"""


def test_a_library_leaves_the_process_as_it_is(tmp_path):
    done = subprocess.run([sys.executable, '-c', LIBRARY, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ''
