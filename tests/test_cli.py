"""Flags, config files and overrides: what they mean, and one line for each mistake."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from commands import EVALUATE, call
from processes import ROOT

from swav_jax import commands, torch_weights
from swav_jax import config as settings
from swav_jax.errors import UserError
from swav_jax.evaluate import linear, semi
from swav_jax.main import main, parse
from swav_jax.torch_weights import layouts

WHOLE = 'from swav_jax import config\n\n\ndef get_config():\n    c = config.default()\n'
LR = 'config.optimizer.param_schedulers.lr'


def changed(*words, config='configs/demo.py'):
    return parse([f'--config={ROOT / config}', *words]).config


@pytest.mark.parametrize(
    ('words', 'name', 'value'),
    [
        ('--config.seed=3', 'seed', 3),
        ('--config.seed 3', 'seed', 3),
        ('--config.loss.epsilon=1', 'loss.epsilon', 1.0),
        ('--config.loss.epsilon=1e-3', 'loss.epsilon', 0.001),
        ('--config.precision=bfloat16', 'precision', 'bfloat16'),
        ('--config.data.source=folder:/a=b,c', 'data.source', 'folder:/a=b,c'),
        ('--config.data.source=1', 'data.source', '1'),
        ('--config.data.source=', 'data.source', ''),
        ('--config.train.per_crop_pass', 'train.per_crop_pass', True),
        ('--config.train.per_crop_pass --config.seed=1', 'train.per_crop_pass', True),
        ('--config.train.per_crop_pass=true', 'train.per_crop_pass', True),
        ('--config.optimizer.nesterov yes', 'optimizer.nesterov', True),
        ('--config.model.head.use_bn=False', 'model.head.use_bn', False),
        ('--config.model.head.use_bn=0', 'model.head.use_bn', False),
        ('--config.model.sync_bn.group_size -1', 'model.sync_bn.group_size', -1),
        ('--config.data.num_crops=(2,6)', 'data.num_crops', (2, 6)),
        ('--config.data.num_crops=[2,6]', 'data.num_crops', (2, 6)),
        ('--config.data.num_crops=2,6', 'data.num_crops', (2, 6)),
        ('--config.data.num_crops=2', 'data.num_crops', (2,)),
        ('--config.data.num_crops[0]=3', 'data.num_crops', (3, 4)),
        ('--config.data.num_crops[-1]=3', 'data.num_crops', (2, 3)),
        ('--config.data.crop_scales[1][0]=0.3', 'data.crop_scales', ((0.4, 1.0), (0.3, 0.4))),
        (f'--{LR}.lengths=(0.1,0.9)', 'optimizer.param_schedulers.lr.lengths', (0.1, 0.9)),
        ('--config.seed=1 --config.seed=2', 'seed', 2),
        *(
            (f'--{LR}.interval_scaling={text}', 'optimizer.param_schedulers.lr.interval_scaling', x)
            for text, x in (
                ('fixed,rescaled', ('fixed', 'rescaled')),
                ('(fixed,rescaled)', ('fixed', 'rescaled')),
                ('("fixed","fixed")', ('fixed', 'fixed')),
                ('fixed', ('fixed',)),
            )
        ),
    ],
)
def test_a_setting_is_changed_in_its_type(words, name, value):
    found = changed(*words.split())
    for part in name.split('.'):
        found = found[part]
    assert found == value and type(found) is type(value)


def test_parts_of_a_schedule_are_changed_and_nothing_else():
    found = changed(f'--{LR}.schedulers[0].end_value=1.6').optimizer.param_schedulers.lr
    before = changed().optimizer.param_schedulers.lr
    assert found.schedulers[0].end_value == 1.6 and found.schedulers[1] == before.schedulers[1]
    assert found.schedulers[0].start_value == before.schedulers[0].start_value


BAD_CHANGES = [
    ('--config.loss.epsilon', 'has no value'),
    ('--config.loss', 'is a section'),
    ('--config.loss=3', 'is a section: set one of crops_for_assign, '),
    ('--config.loss=', 'is a section'),
    ('--config.optimizer.param_schedulers.lr=cosine', 'is a section'),
    ('--config.=3', 'is not a setting'),
    ('--config..=3', 'is not a setting'),
    ('--config.seed.=3', 'is not a setting'),
    ('--config.seed.x=3', 'is not a setting'),
    ('--config.data[0]=3', 'is not a setting'),
    ('--config.loss.epsilon[0]=3', 'is not a setting'),
    ('--config.data.num_crops[=3', 'is not a setting'),
    ('--config.data.num_crops[]=3', 'is not a setting'),
    ('--config.data.num_crops[x]=3', 'is not a setting'),
    ('--config.data.num_crops.0=3', 'is not a setting'),
    ('--config.data.num_crops[0', 'is not a setting'),
    ('--config.loss.temprature=1', 'the nearest one is --config.loss.temperature'),
    ('--config.temperature=1', 'the nearest one is --config.loss.temperature'),
    ('--config.Seed=1', 'the nearest one is --config.seed'),
    (f'--{LR}.schedulers[0].end_valu=1', f'nearest one is --{LR}.schedulers[0].end_value'),
    (f'--{LR}.schedulers[2].end_value=1', 'there are 2 of them, from [0] to [1]'),
    ('--config.data.num_crops[2]=3', 'there are 2 of them'),
    ('--config.data.num_crops[-3]=3', 'there are 2 of them'),
    ('--config.data.num_crops[99999999999999999999]=3', 'num_crops'),
    ('--config.data.num_crops[0]=a', 'must be a whole number'),
    ('--config.data.num_crops=' + '(' * 9999, 'must be as (1, 2)'),
    ('--config.data.num_crops=2 6', 'must be as (1, 2)'),
    ('--config.data.num_crops=__import__("os")', 'must be as (1, 2)'),
    ('--config.data.crop_scales=big', 'must be as ((0.4, 1.0), '),
    (f'--{LR}.interval_scaling=rescaled;fixed', "must be as ('rescaled', 'fixed')"),
    ('--config.seed=' + '9' * 5000, 'must be a whole number'),
    ('--config.seed=1.5', 'must be a whole number'),
    ('--config.seed=', 'must be a whole number'),
    ('--config.seed=True', 'must be a whole number'),
    ('--config.loss.epsilon=small', 'must be a number'),
    ('--config.loss.epsilon=(1,)', 'must be a number'),
    ('--config.train.per_crop_pass=perhaps', 'must be true or false'),
    ('--config.train.per_crop_pass=', 'must be true or false'),
    ('--config.loss.temprature\x1b[31m=1', 'is not a setting'),
    ('--config.se\ned=1', 'is not a setting'),
]

BAD_CONFIGS = [
    (b'', 'has no function get_config'),
    (b'get_config = 3\n', 'has no function get_config'),
    (b'def get_config():\n    return (1\n', 'line 2'),
    (b'def get_config():\n  return 1\n   return 2\n', 'line 3'),
    (b'raise SystemExit(0)\n', 'line 1: SystemExit'),
    (b'import sys\nsys.exit("gone")\n', 'line 2: SystemExit: gone'),
    (b'def get_config():\n    raise SystemExit\n', 'line 2: SystemExit'),
    (b'def get_config():\n    raise KeyboardInterrupt\n', 'line 2: KeyboardInterrupt'),
    (b'class Mine(BaseException): pass\ndef get_config():\n    raise Mine("x")\n', 'Mine: x'),
    (b'class E(Exception):\n  def __str__(self): 1 / 0\nraise E\n', 'line 3: E'),
    (b'class E(Exception):\n  def __str__(self): return 3\nraise E\n', 'line 3: E'),
    (b'raise ExceptionGroup("two\\nlines", [ValueError()])\n', 'ExceptionGroup: two lines'),
    (b'raise OSError(2, "gone", "x")\n', 'line 1: FileNotFoundError'),
    (b'raise MemoryError\n', 'line 1: MemoryError'),
    (b'raise SyntaxError("odd")\n', 'SyntaxError: odd'),
    (b'raise Exception("a\\x1b[31m\\nb" * 999)\n', 'line 1: Exception: a'),
    (b'def get_config():\n    return get_config()\n', 'RecursionError'),
    (b'import no_such_module\n', "No module named 'no_such_module'"),
    (b'from swav_jax.config import nothing\n', 'line 1: ImportError'),
    (b'def get_config(): yield 1\n', 'config is a generator'),
    (b'def get_config(): return None\n', 'config is a NoneType, not a ConfigDict'),
    (b'def get_config(): pass\n', 'config is a NoneType, not a ConfigDict'),
    (b'def get_config(): return {}\n', 'config is a dict, not a ConfigDict'),
    (b'def get_config(): return 3\n', 'config is a int, not a ConfigDict'),
    (b'def get_config(a, b): return 3\n', 'TypeError'),
    (b'def get_config(*, a): return 3\n', 'TypeError'),
    (b'from ml_collections import ConfigDict as get_config\n', 'is missing'),
    ('def get_config(): return "é"\n'.encode('latin-1'), 'codec can\'t decode'),
    (b'\x00\x01\x02' * 99, 'null bytes'),
    (b'\x89PNG\r\n\x1a\n' + bytes(range(256)), 'null bytes'),
    (b'x = ' + b'(' * 9999, 'too many nested parentheses'),
    (b'x = ' + b'-' * 200_000 + b'1', 'rror'),
    ('\ufeffdef get_config(): return 1\n'.encode('utf-16'), 'null bytes'),
    (b'# coding: nonsense\n', 'nonsense'),
] + [
    ((WHOLE + f'    {line}\n    return c\n').encode(), part)
    for line, part in (
        ('c.loss.temprature = 1', 'line 6: AttributeError: Key "temprature"'),
        ('c.loss = 3', 'line 6: TypeError'),
        ('c.seed = 1.5', 'line 6: TypeError'),
        ('c.unlock(); del c.loss', 'config.loss is missing'),
        ('c.unlock(); del c.loss.epsilon', 'config.loss.epsilon is missing'),
        ('c.unlock(); c.los = 1', 'config.los is not a setting'),
        ('c.unlock(); c.loss.unlock(); c.loss.eps = 1', 'config.loss.eps is not a setting'),
        ('c.unlock(); del c.loss; c.loss = 3', 'config.loss is a int, not a ConfigDict'),
        ('c.unlock(); del c.loss; c.loss = c', 'config.loss holds itself'),
        ('c.unlock(); del c.seed; c.seed = c', 'config.seed holds itself'),
        ('lr = c.optimizer.param_schedulers.lr; lr.unlock(); lr.again = c', 'holds itself'),
        ('lr = c.optimizer.param_schedulers.lr; lr.schedulers = (lr,)', 'holds itself'),
        ('lr = []; lr.append(lr); c.data.num_crops = (lr,)', 'holds itself'),
        ('c = c.to_json()', 'config is a str, not a ConfigDict'),
    )
]  # fmt: skip


@pytest.mark.parametrize(('text', 'part'), BAD_CONFIGS)
def test_what_a_config_file_does_wrong_is_one_line(text, part, tmp_path, capsys):
    file = tmp_path / 'broken.py'
    file.write_bytes(text)
    for flags in (['--plan'], ['--help'], [f'--workdir={tmp_path / "run"}', '--config.seed=1']):
        assert main([f'--config={file}', *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith('error: --config') and error.count('\n') == 1, error
        assert part in error and '\x1b' not in error and len(error) < 1000
    assert not (tmp_path / 'run').exists()


def test_a_config_file_runs_once_and_may_take_words_or_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = (
        '    from pathlib import Path\n'
        '    Path("count").write_text(Path("count").read_text() + "x")\n    return c\n'
    )
    with_words = WHOLE.replace('get_config()', 'get_config(words)') + '    c.data.source = words\n'
    without = WHOLE + '    c.data.source = "none"\n'
    both = with_words.replace('(words)', '(words="default")')
    (tmp_path / 'a:b').mkdir()
    for file, text in {
        'with.py': with_words + count,
        'without.py': without + count,
        'both.py': both + count,
        'a:b/both.py': both + count,
    }.items():
        Path(file).write_text(text)
    for spec, found in (
        ('with.py', ''),
        ('with.py:x', 'x'),
        ('with.py:x:y', 'x:y'),
        ('without.py', 'none'),
        ('without.py:', 'none'),
        ('both.py', 'default'),
        ('both.py:x', 'x'),
        ('a:b/both.py', 'default'),
        ('a:b/both.py:x', 'x'),
    ):
        Path('count').write_text('')
        config = changed('--config.seed=3', '--config.loss.epsilon=1', config=tmp_path / spec)
        assert (config.data.source, config.seed) == (found, 3)
        assert Path('count').read_text() == 'x', spec
    with pytest.raises(UserError, match="'x' after the colon: this file takes no words"):
        changed(config=tmp_path / 'without.py:x')


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'c.py').write_text(WHOLE + '    return c\n')
    found = parse(['--config=~/c.py', '--workdir=~/run'])
    assert found.workdir == tmp_path / 'run' and found.config.seed == 0


# What is wrong with the flags of a command; {run}, {file} and {folder} are there.
BAD_PATHS = ['', '/', '~nosuchuser/x', '{file}/x', '{file}/x/y', 'a' * 300, 'b/' * 3000]
WRITES = ('clusters', 'features')
COMMANDS = {
    'swav_jax.main': (
        ['--config={config}'],
        {
            '--workdir': [*BAD_PATHS, '{file}', '/dev/full', '/dev/null/x', '/proc/x'],
            '--replicas': ['-1', 'x', '1.5', '1e3', '', '9' * 30],
            '--images_per_second': ['nan', 'inf', '-inf', '0', '-1', 'x', '', '1e300'],
            '--memory': ['80', 'GB', '0GB', '-1GB', 'nanGB', '80TB', '1e3', '9' * 30 + 'GB', ''],
            '--profile': ['-3', 'x', '9' * 30],
            '--num_processes': ['0', '-1', 'x', '9' * 30],
            '--process_id': ['-1', 'x', '9' * 30],
            '--force': ['maybe', '2', ''],
            '--plan': ['maybe'],
            '--distributed': ['maybe'],
        },
    ),
    'swav_jax.commands.preview': (
        ['--config={config}'],
        {
            '--output': [*BAD_PATHS, '{folder}', '/dev/full', 'x.foo', 'x.txt', 'x.png/'],
            '--images': ['0', '-1', 'x', '9' * 30],
        },
    ),
    'swav_jax.export': (
        [],
        {
            '--workdir': [*BAD_PATHS, '{file}', '{folder}'],
            '--out': [*BAD_PATHS, '{folder}', '/dev/full', 'x.pth/'],
            '--layout': ['timm', ''],
            '--format': ['onnx'],
            '--step': ['-1', 'x', '9' * 30],
        },
    ),
    'swav_jax.commands.replay': ([], {}),
    'swav_jax.evaluate.compare': (
        [],
        {'--out': [*BAD_PATHS, '{folder}', '/dev/full', 'x.txt', 'metrics.jsonl', 'x.html/']},
    ),
    'swav_jax.evaluate.knn': (
        [],
        {
            '--workdir': [*BAD_PATHS, '{file}', '{folder}'],
            '--limit': ['-5', 'x', '1.5', '9' * 30],
            '--step': ['-1', 'x', '9' * 30],
            '--k': ['nan', '0', '1.5'],
        },
    ),
    'swav_jax.evaluate.semi': (
        [],
        {
            '--epochs': ['nan', '0', '-3', '1.5'],
            '--batch_size': ['nan', '0', '1.5'],
            '--share': ['nan', 'inf', '-1', '0', '1.1'],
            '--learning_rate': ['nan', 'inf', '-1', '0'],
            '--trunk_learning_rate': ['nan', 'inf', '-1', '0'],
            '--seed': ['nan', '-1', str(2**32)],
        },
    ),
    'swav_jax.evaluate.linear': (
        [],
        {
            '--c': ['nan', 'inf', '-1', '0'],
            '--crop_scale': ['nan', '0', '1.1', 'None', 'none none'],
        },
    ),
}
NEEDED = {
    'swav_jax.main': ['--workdir={run}'],
    'swav_jax.export': ['--out={new}', '--workdir={run}'],
    'swav_jax.evaluate.knn': ['--workdir={run}'],
    'swav_jax.evaluate.linear': ['--workdir={run}'],
    'swav_jax.evaluate.semi': ['--workdir={run}'],
}
SPECS = [
    *('', '/', '{folder}', '{file}', 'none.py', 'none.py:3', '~nosuchuser/c.py', 'a' * 300),
    *('/dev/null', '/dev/zero', '/dev/full', 'b/' * 3000, '{config}:word', 'a\0b', ':', '::'),
]


def bad_command_lines():
    """Programs, their flags, and what the error must name."""
    for program, (flags, values) in COMMANDS.items():
        needs = NEEDED.get(program, [])
        for flag, texts in values.items():
            others = [need for need in needs if not need.startswith(f'{flag}=')]
            yield from ((program, [*flags, *others, f'{flag}={text}'], flag) for text in texts)
            if flag not in ('--force', '--plan', '--distributed'):
                yield program, [*flags, *others, flag], flag
        for word in ('--nonsense', '--workdri=x', '-x', 'word', '--no\nsense', '--\x1b[31m', '--h'):
            yield program, [*flags, *needs, word], ''
    for word, part in BAD_CHANGES:
        yield 'swav_jax.main', ['--config={config}', '--workdir={run}', word], part
        yield 'swav_jax.commands.preview', ['--config={config}', word], part
        yield 'swav_jax.evaluate.knn', ['--config={config}', '--weights={file}', word], part
    for spec in SPECS:
        yield 'swav_jax.main', [f'--config={spec}', '--workdir={run}'], ''
        yield 'swav_jax.commands.preview', [f'--config={spec}', '--output={new}.png'], ''
        yield 'swav_jax.evaluate.knn', [f'--config={spec}', '--weights={file}'], ''
    for word in ('--config.seed=1', '--config.nonsense=1'):
        yield 'swav_jax.main', [word], 'needs a --config'
        yield 'swav_jax.commands.preview', [word], '--config is missing'
        yield 'swav_jax.export', ['--workdir={run}', '--out={new}', word], word
        yield 'swav_jax.commands.replay', ['{folder}', word], word
    for flags in ([], ['{folder}'], ['{file}'], ['{new}'], ['{folder}', '{folder}'], ['a' * 300]):
        yield 'swav_jax.commands.replay', flags, ''
    for name in EVALUATE:
        program, out = f'swav_jax.evaluate.{name}', ['--out={new}'] * (name in WRITES)
        yield program, [], 'missing'
        yield program, ['--workdir={run}', *out], 'holds no checkpoints'
        yield program, ['--workdir={run}', '--weights={file}', *out], '--weights'
        yield program, ['--workdir={run}', '--limit=-5', *out], '--limit=-5'
        yield program, ['--workdir={run}', '--nonsense', *out], "'--nonsense' is not known"
        yield program, ['--workdir={run}', 'word', *out], "'word' is not a flag"
        if name != 'report':
            yield program, ['--workdir={run}', '--config={config}', *out], 'goes with --weights'
            yield program, ['--weights={file}', '--step=3', *out], 'goes with --workdir'
            yield program, ['--weights={new}.pth', '--config={config}', *out], 'new.pth'
    for flag in ('--steps=0', '--batch=x', '--arch=vgg', '--precision=float8', 'x'):
        yield 'scripts/parity.py', [flag], flag.partition('=')[0]
    for flag in ('--kills=-1', '--seed=x', 'x'):
        yield 'scripts/chaos.py', [flag], flag.partition('=')[0]
    for flag in ('', 'nonsense', 'step --rounds=0', 'step --json={folder}', 'step --batches=x'):
        yield 'scripts/benchmark.py', flag.split(), ''
    for flag in ('', '--output={folder}', '--output={new} --source={file}'):
        yield 'scripts/make_demo_data.py', flag.split(), ''


def test_every_mistake_on_a_command_line_is_one_line(tmp_path, capsys, monkeypatch):
    """Hundreds of them, in one process: exit code 2, one line, no stack trace."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').write_text('text')
    places = {name: str(tmp_path / name) for name in ('run', 'file', 'folder', 'new')}
    places['config'] = str(ROOT / 'configs' / 'demo.py')
    wrong, count = [], 0
    for program, flags, part in bad_command_lines():
        words = []
        for flag in flags:
            for name, place in places.items():
                flag = flag.replace(f'{{{name}}}', place)
            words.append(flag)
        try:
            code = call(program, *words)
        except BaseException as error:
            code = repr(error)
        count += 1
        out, error = capsys.readouterr()
        one_line = error.startswith('error: ') and error.count('\n') == 1 and '\x1b' not in error
        if code != 2 or not one_line or out or part not in error:
            wrong.append((program, [word[:80] for word in words], code, out[:200], error[:300]))
    assert not wrong, '\n'.join(map(str, wrong))
    assert count > 350
    assert sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder'], 'something was written'


CONSOLE = """
import sys
from swav_jax.commands import main
sys.argv = ['/usr/bin/swav_jax', *sys.argv[1:]]
code = main()
heavy = sorted({'jax', 'tensorflow', 'torch', 'orbax'} & sys.modules.keys())
print(code, *heavy)
"""


def console(*words):
    """Exit code and heavy modules as a line, what is printed before it, and stderr."""
    done = subprocess.run(
        [sys.executable, '-c', CONSOLE, *words], capture_output=True, text=True, cwd=ROOT
    )
    *out, last = done.stdout.splitlines()
    return last, out, done.stderr


def test_the_console_script_is_that_of_the_package():
    with (ROOT / 'pyproject.toml').open('rb') as file:
        assert tomllib.load(file)['project']['scripts'] == {'swav_jax': 'swav_jax.commands:main'}
    assert {module for module, _, _ in commands.COMMANDS.values()} == {
        'swav_jax.main', 'swav_jax.export', 'swav_jax.commands.preview', 'swav_jax.commands.replay',
        'swav_jax.evaluate.compare',
        *(f'swav_jax.evaluate.{name}' for name in EVALUATE),
    }  # fmt: skip


def test_the_console_scripts_help_and_mistakes_are_fast():
    """They are said without JAX and TensorFlow."""
    code, out, error = console('--help')
    assert (code, error) == ('0', '')
    listed = [line.split()[0] for line in out if line.startswith('  ')]
    assert listed == [*commands.COMMANDS]
    for words, said in (
        (['trian'], "error: 'trian' is not a command. Did you mean: train?"),
        (['Knn'], "error: 'Knn' is not a command. Did you mean: knn?"),
        (['--config=x'], "error: '--config=x' is not a command: see swav_jax --help"),
        ([''], "error: '' is not a command: see swav_jax --help"),
        ([], 'error: the name of a command is missing: see swav_jax --help'),
        (['train', '--nonsense'], "error: '--nonsense' is not known: see --help"),
        (['plan', '--config=none.py'], 'error: --config=none.py: there is no such file'),
    ):
        code, out, error = console(*words)
        assert (code, out, error.count('\n')) == ('2', [], 1) and error.startswith(said)


# Of each command: what it needs at least, and a flag with a value that is not allowed.
RUN = '--workdir={run}'
WITHOUT_JAX = {
    'train': ('--config={config} --workdir={new}', '--profile=-1'),
    'plan': ('--config={config}', '--replicas=x'),
    'preview': ('--config={config}', '--images=0'),
    'knn': (RUN, '--k=0'),
    'linear': (RUN, '--crop_scale=2'),
    'semi': (RUN, '--share=1.1'),
    'clusters': (f'{RUN} --out={{new}}', '--head=-1'),
    'features': (f'{RUN} --out={{new}}', '--limit=x'),
    'report': (RUN, '--step=-1'),
    'export': (f'{RUN} --out={{new}}', '--layout=timm'),
    'replay': ('{run}', '--help=x'),
    'compare': ('{run} {run}/', '--out=x.txt'),
}
MANY = """
import contextlib, io, json, sys
from swav_jax import commands
found = []
for name, words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = commands.main([name, *words])
    heavy = sorted({'jax', 'tensorflow', 'torch', 'orbax'} & sys.modules.keys())
    found.append((code, len(out.getvalue().splitlines()), err.getvalue(), heavy))
print(json.dumps(found))
"""


def lines_without_jax(run, new):
    """Commands, words, and what the refusal contains; None for a page of --help."""
    places = {'run': run, 'new': new, 'config': f'{ROOT}/configs/demo.py'}
    for name, (needed, out_of_range) in WITHOUT_JAX.items():
        words = needed.format(**places).split()
        yield name, ['--help'], None
        yield name, [*words, '--nonsense=1'], "'--nonsense=1' is not known"
        yield name, [*words, out_of_range], out_of_range.partition('=')[0]
        yield name, words[1:], 'missing'
        if name not in ('export', 'replay', 'compare'):
            yield name, [*words, '--config.evaluate.sise=3'], 'nearest one is --config.evaluate.si'
            yield name, [*words, '--config.evaluate.size=x'], 'must be a whole number'
            yield name, [*words, '--config.evaluate.size=0'], 'config.evaluate.size=0: must be'
        if RUN in needed:
            missing = [word.replace(run, f'{new}/none') for word in words]
            yield name, missing, f'--workdir={new}/none holds no checkpoints'
        if RUN in needed and name not in ('report', 'export'):
            weights = [f'--weights={new}.pth', *words[1:]]
            weights += [f'--out={new}'] * (name in ('linear', 'semi'))
            yield name, weights, f'{new}.pth does not exist'
            yield name, [*weights, '--config=none.py'], 'there is no such file'
            yield name, [*weights, '--config.evaluate.sise=3'], 'nearest one is --config.evaluate'
    yield 'train', [WITHOUT_JAX['plan'][0].format(**places)], '--workdir is missing'
    yield 'replay', [new], 'holds no dump'
    yield 'compare', [run, new], 'new holds no metrics.jsonl'
    yield 'compare', [run, run], 'are the same folder'


def test_help_and_mistakes_of_every_command_are_fast(tmp_path):
    """They are reported without importing JAX and TensorFlow."""
    run = tmp_path / 'run'
    (run / 'checkpoints').mkdir(parents=True)
    (run / 'about.json').write_text('{}')
    (run / 'metrics.jsonl').write_text('')
    (run / 'config.json').write_text(json.dumps(settings.to_dict(settings.default())))
    lines = list(lines_without_jax(str(run), str(tmp_path / 'new')))
    assert {name for name, _, _ in lines} == set(commands.COMMANDS)
    done = subprocess.run(
        [sys.executable, '-c', MANY, json.dumps([line[:2] for line in lines])],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for line, (code, printed, error, heavy) in zip(lines, json.loads(done.stdout), strict=True):
        _, _, part = line
        assert heavy == [], line
        if part is None:
            assert code == 0 and printed > 5 and not error, (line, error)
        else:
            assert code == 2 and not printed and error.count('\n') == 1, (line, error)
            assert error.startswith('error: ') and part in error, (line, error)
    assert [path.name for path in tmp_path.iterdir()] == ['run'], 'nothing is written'


def test_choices_are_those_of_the_modules():
    """`cli.flags` repeats them because the modules import JAX."""

    def choices(name, *flags):
        try:
            commands.parse(name, flags)
        except UserError as error:
            return set(re.findall(r"'?(\w+)'?[,)]", str(error).partition('choose from')[2]))

    assert choices('linear', '--preset=x') == {*linear.PRESETS, 'logistic'}
    assert choices('semi', '--preset=x') == {*semi.PRESETS}
    assert choices('export', '--layout=x') == {*layouts.LAYOUTS}
    assert choices('export', '--format=x') == {*torch_weights.FORMATS}


@pytest.mark.parametrize('name', commands.COMMANDS)
def test_each_command_has_a_page_of_help_by_either_name(name, capsys):
    assert commands.main([name, '--help']) == 0
    page = capsys.readouterr()
    assert len(page.out.splitlines()) > 5 and not page.err
    module, _, _ = commands.COMMANDS[name]
    assert call(module, '--help') == 0
    assert capsys.readouterr().out.partition('\n\n')[2] == page.out.partition('\n\n')[2]
    assert commands.main([name, '--nonsense']) == 2
    assert capsys.readouterr().err.startswith("error: '--nonsense' is not known")


def test_help_with_a_config_lists_its_settings(capsys):
    for name in ('train', 'knn', 'preview'):
        words = [f'--config={ROOT}/configs/demo.py', '--help', '--config.loss.epsilon=0.5']
        assert commands.main([name, *words]) == 0
        assert '\n  --config.loss.epsilon=0.5  ' in capsys.readouterr().out


def test_a_plan_by_the_console_script(capsys):
    assert commands.main(['plan', f'--config={ROOT}/scripts/tiny.py', '--replicas=2']) == 0
    assert 'steps ' in capsys.readouterr().out


@pytest.mark.parametrize('name', commands.COMMANDS)
def test_every_command_has_a_main(name, capsys):
    module = importlib.import_module(commands.COMMANDS[name][0])
    assert module.main(['--nonsense=1']) == 2
    assert "'--nonsense=1' is not known" in capsys.readouterr().err
