"""Imports run one way, and nothing heavy comes along unasked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / 'swav_jax'

# What each part must not know, directly or through others.
FORBIDDEN = {
    'swav_jax': ('jax', 'tensorflow', 'torch', 'flax'),
    'swav_jax.methods.swav': ('flax', 'tensorflow', 'torch', 'ml_collections'),
    'swav_jax.optim': ('flax', 'tensorflow', 'torch', 'ml_collections'),
    'swav_jax.step': ('tensorflow', 'torch', 'orbax'),
    'swav_jax.models': ('tensorflow', 'torch', 'orbax'),
    'swav_jax.main': ('jax', 'tensorflow', 'torch', 'flax'),
    'swav_jax.torch_weights': ('torch', 'tensorflow'),
}


@pytest.mark.parametrize('module', FORBIDDEN)
def test_a_part_does_not_import_what_it_must_not_know(module):
    code = f'import sys, {module}; print(*sys.modules)'
    loaded = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(FORBIDDEN[module]) & set(loaded)


def imports_of(path):
    """The first name of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or '').partition('.')[0]


def test_only_checkpoint_knows_orbax():
    others = [path for path in ROOT.rglob('*.py') if path.name != 'checkpoint.py']
    assert not [path for path in others if 'orbax' in imports_of(path)]


def test_the_input_knows_tensorflow_and_not_jax_and_no_other_part_knows_tensorflow():
    inside = set((ROOT / 'data').glob('*.py'))
    readers = [path for path in inside if path.name != 'preview.py']  # it draws finished crops
    assert not [path for path in readers if {'jax', 'flax'} & set(imports_of(path))]
    assert not [p for p in set(ROOT.rglob('*.py')) - inside if 'tensorflow' in imports_of(p)]


def test_nothing_below_imports_the_training_loop():
    below = [path for path in ROOT.rglob('*.py') if path.name not in ('main.py', 'training.py')]
    assert not [path for path in below if 'import train' in path.read_text()]
