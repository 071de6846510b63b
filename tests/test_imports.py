"""Imports run one way, and nothing heavy comes along unasked."""

import ast
import functools
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
    'swav_jax.commands': ('jax', 'tensorflow', 'torch', 'flax'),
    'swav_jax.torch_weights': ('torch', 'tensorflow'),
    'swav_jax.data.sources': ('jax', 'flax'),
    'swav_jax.evaluate.compare': ('jax', 'tensorflow', 'torch', 'flax'),
    'swav_jax.evaluate.model': ('swav_jax.cli', 'swav_jax.evaluate.command'),
}

# Folders and files of swav_jax/: each imports from the lines above its own, not from beside it.
LAYERS = (
    ('errors',),
    ('files',),
    ('config', 'precision', 'cpu', 'xla_flags'),
    ('cli', 'parallel', 'data'),
    ('methods', 'models', 'augment', 'optim'),
    ('state',),
    ('step',),
    ('runs',),
    ('torch_weights',),
    ('evaluate',),
    ('training',),
    ('commands',),
    ('main', 'export'),
)
# Packages that one part alone may import.
ONLY = {
    'orbax': 'runs.checkpoint',
    'tensorflow': 'data',
    'tensorflow_datasets': 'data',
    'torch': 'torch_weights',
    'safetensors': 'torch_weights',
}
# Packages that a part must not import.
NEVER = {'jax': ('data', 'config', 'cli', 'main'), 'flax': ('data',)}
# All that a part may import from elsewhere.
NOTHING_BUT = {
    'methods': {'jax', 'optax', 'jaxtyping'},
    'optim': {'jax', 'optax', 'jaxtyping', 'numpy'},
}
BY_NAME = {'', 'commands'}  # import by a name that is a string, which is not read here


@pytest.mark.parametrize('module', FORBIDDEN)
def test_a_part_does_not_import_what_it_must_not_know(module):
    code = f'import sys, {module}; print(*sys.modules)'
    loaded = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(FORBIDDEN[module]) & set(loaded)


def texts():
    """The text of each module, by its name in the package: '' is the package itself."""
    found = {}
    for path in ROOT.rglob('*.py'):
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        found[name.removesuffix('__init__').removesuffix('.')] = path.read_text()
    return found


def read(modules):
    """Of each module, the modules that it imports, and the names of what is not swav_jax's.

    What functions import counts; what a file does as a script, or for type checkers, does not.
    """
    found = {}
    for module, text in modules.items():
        inside, outside = set(), set()
        for name in imported(text):
            parts = name.split('.')
            if parts[0] != ROOT.name:
                outside.add(name)
                continue
            while '.'.join(parts[1:]) not in modules:  # the last part is a function
                parts.pop()
            inside.add('.'.join(parts[1:]))
        found[module] = inside - {module}, outside
    return found


@functools.cache
def imported(text):
    """What a file imports: `a.b.c` of `from a.b import c`."""
    waiting, found = [ast.parse(text)], []
    while waiting:
        node = waiting.pop()
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            'TYPE_CHECKING',
            "__name__ == '__main__'",
        ):
            for child in node.body:
                waiting.remove(child)
        elif isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, 'a relative import is not read here'
            found.extend(f'{node.module}.{alias.name}' for alias in node.names)
    return found


def wrong(modules):
    """Each import that must not be, as text."""
    level = {part: i for i, parts in enumerate(LAYERS) for part in parts}
    for module, (inside, outside) in sorted(modules.items()):
        part = module.partition('.')[0]
        for other in sorted(inside - {''}):
            theirs = other.partition('.')[0]
            if module == '':
                yield f'swav_jax imports {other}: importing the package would load it'
            elif part != theirs and level[theirs] >= level[part]:
                yield f'{module} imports {other}, which is not below it'
        if outside & {'importlib', 'importlib.import_module'} and module not in BY_NAME:
            yield f'{module} imports by name'
        for name in sorted({name.partition('.')[0] for name in outside}):
            never = any(within(module, where) for where in NEVER.get(name, ()))
            allowed = [names for where, names in NOTHING_BUT.items() if within(module, where)]
            unasked = allowed and name not in sys.stdlib_module_names | set.union(*allowed)
            if never or unasked or not within(module, ONLY.get(name, module)):
                yield f'{module} imports {name}'
    for circle in circles({module: inside for module, (inside, _) in modules.items()}):
        yield f'{", ".join(sorted(circle))} import each other'


def within(module, part):
    return module == part or module.startswith(f'{part}.')


def circles(imports):
    """Sets of modules each of which is reached from each other one."""
    reached = {}
    for start in imports:
        seen, waiting = set(), [start]
        while waiting:
            for other in imports[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        reached[start] = seen
    found = {frozenset(b for b in reached[a] if a in reached[b]) for a in imports}
    return [set(circle) for circle in found if circle]


def test_imports_run_one_way():
    modules = read(texts())
    assert len(modules) > 60
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == '.py' or path.is_dir()}
    layered = {part for parts in LAYERS for part in parts}
    assert layered == {p for p in parts if not p.startswith('__')}, 'each has its layer'
    assert list(wrong(modules)) == []


@pytest.mark.parametrize(
    ('module', 'line', 'said'),
    [
        ('step', 'from swav_jax.runs import checkpoint', 'step imports runs.checkpoint'),
        ('step', 'def f():\n    from swav_jax import training', 'step imports training'),
        ('models.norm', 'import swav_jax.optim', 'models.norm imports optim'),
        ('parallel.mesh', 'from swav_jax.runs.signals import Signals', 'imports runs.signals'),
        ('data.names', 'from swav_jax.parallel.mesh import AXES', 'imports parallel.mesh'),
        ('data.names', 'from swav_jax.data import sources', 'data.names, data.sources, '),
        ('models.remat', 'def f():\n    from swav_jax import models', 'import each other'),
        ('runs.rows', 'def f():\n    import orbax.checkpoint', 'runs.rows imports orbax'),
        ('evaluate.knn', 'from tensorflow import data', 'evaluate.knn imports tensorflow'),
        ('methods.swav', 'import flax.linen as nn', 'methods.swav imports flax'),
        ('optim', 'from ml_collections import ConfigDict', 'optim imports ml_collections'),
        ('data.names', 'def f():\n    import jax', 'data.names imports jax'),
        ('runs.rows', 'import importlib', 'runs.rows imports by name'),
        ('', 'from swav_jax.config import default', 'swav_jax imports config'),
        ('optim', 'if TYPE_CHECKING:\n    from swav_jax import step', ''),
        ('optim', "if __name__ == '__main__':\n    from swav_jax import commands", ''),
    ],
)
def test_an_import_against_the_rules_is_found(module, line, said):
    changed = texts()
    changed[module] += f'\n{line}\n'
    found = '\n'.join(wrong(read(changed)))
    assert said in found and bool(said) == bool(found)
