"""Every command that README, docs, config heads and --help pages name is taken as it is written."""

import ast
import re
import shlex

import pytest
from commands import EVALUATE, call
from PIL import Image
from processes import ROOT, TINY
from small_run import write_run

from swav_jax import cli, export, main
from swav_jax import config as settings
from swav_jax.evaluate import command

PROGRAM = re.compile(r'python3? +(?:-m +(swav_jax[\w.]*)|(scripts/\w+\.py))')


def documents():
    """Name and text of everything that tells a user what to type."""
    for path in [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]:
        yield path.name, path.read_text()
    for path in sorted((ROOT / 'scripts').iterdir()):
        if path.suffix in ('.sbatch', '.yaml'):
            yield path.name, path.read_text()
    for folder in ('configs', 'scripts', 'swav_jax'):
        for path in sorted((ROOT / folder).rglob('*.py')):
            yield str(path.relative_to(ROOT)), ast.get_docstring(ast.parse(path.read_text())) or ''


def commands():
    """(document, program, words) of each command, as it is written."""
    for name, text in documents():
        text = re.sub(r'\\\n\s*', ' ', text)  # lines that go on
        text = re.sub(r'\n[ \t]+(?=\[?--)', ' ', text)
        for found in PROGRAM.finditer(text):
            rest = re.split(r'\n|`|  +#|  +(?=\w)', text[found.end() :], maxsplit=1)[0]
            yield name, found[1] or found[2], rest.strip()


def filled(words, places):
    """A documented command's words with real things for its placeholders."""
    words = re.sub(r'\[:\w+\]| "\$@".*|\.\.\.', '', words)
    words = re.sub(r'[\[\]](?!\d)', '', words)  # what may be left out is given
    words = re.sub(r'[{](\w+),[^}]*[}]', r'\1', words)  # the first of a choice
    for pattern, value in places:
        words = re.sub(pattern, value, words)
    return shlex.split(words)


@pytest.fixture(scope='module')
def places(tmp_path_factory):
    """A run, its weights and class folders, of the sizes that tests can afford."""
    root = tmp_path_factory.mktemp('documented')
    write_run(root / 'run')
    export.export(root / 'run', root / 'weights.pth')
    for split in ('train', 'val'):
        for label in 'ab':
            (root / 'images' / split / label).mkdir(parents=True)
            Image.new('RGB', (32, 32), 40).save(root / 'images' / split / label / '0.jpg')
    (root / 'many').mkdir()
    for i in range(64):  # which the recipes for small data look at
        Image.new('RGB', (32, 32), i).save(root / 'many' / f'{i}.png')
    return [
        (r'/my/(?:images|photos|thumbnails)\b', str(root / 'many')),
        (r'/(?:imagenet|data/imagenet|shared/imagenet)\b', str(root / 'images')),
        (r'folder:(/photos|/path/to/images|/path|/images)\b', f'folder:{root / "images"}'),
        (r'--config\.SETTING=VALUE', '--config.seed=1'),
        (r'--config[ =]FILE', f'--config {TINY}'),
        (r'--weights[ =]\S+', f'--weights {root / "weights.pth"}'),
        (r'\bRUN/nan_dump', str(root / 'run' / 'nan_dump')),
        (r'--workdir[ =](RUN|runs/\w+|\S+/runs/\w+)', f'--workdir {root / "run"}'),
        (r'--(out|json|output)[ =](\S*?)([^/\s]+)(?=\s|$)', rf'--\1 {root}/new.\3'),
        (r'new\.FILE', 'new.pth'),
        (r'HOST:PORT', 'localhost:1234'),
        (r'--(num_processes|profile|step)=N', r'--\1=2'),
        (r'=I\b', '=0'),
        (r'\$JOB_COMPLETION_INDEX', '0'),
        (r'^…', f'--config {TINY} --workdir {root / "run"}'),
        (r'--(layout|format) (\w+)(\|\w+)+', r'--\1 \2'),
        (r'(--step) N', r'\1 3'),
        (r'--limit N', '--limit 4'),
    ]


def programs():
    """Every program that is documented, once."""
    return sorted({program for _, program, _ in commands() if not program.endswith('.')})


def test_commands_are_found():
    """So that the tests below look at what they mean to look at."""
    assert len(list(commands())) > 60
    assert set(programs()) == {
        *('swav_jax.main', 'swav_jax.export'),
        *('swav_jax.commands.preview', 'swav_jax.commands.replay', 'swav_jax.evaluate.compare'),
        *(f'swav_jax.evaluate.{name}' for name in EVALUATE),
        *(str(path.relative_to(ROOT)) for path in (ROOT / 'scripts').glob('*.py')
          if 'sys.argv' in path.read_text() and path.stem != 'benchmark_step'),
        'scripts/evaluate_torch.py',
    }  # fmt: skip


@pytest.mark.parametrize('program', programs())
def test_help_is_a_page(program, capsys):
    assert call(program, '--help') == 0
    out, error = capsys.readouterr()
    assert len(out.splitlines()) > 5 and not error


class Reached(Exception):
    """A command came as far as this test goes."""


def taken(program, words, monkeypatch):
    """Whether a command's flags, settings and network are taken; raises what it raises.

    What comes after that belongs to other tests. Images are looked for, too.
    """
    parse, load = cli.Parser.parse, command.load

    def parse_and_stop(self, argv):
        found = parse(self, argv)
        if not program.startswith('swav_jax.evaluate') or program.endswith('compare'):
            if config := cli.read_config(getattr(found, 'config', None), found.changes):
                settings.validate(config)
            raise Reached
        return found

    def load_and_stop(arguments):
        model = load(arguments)
        for flag in ('train', 'test', 'source'):
            if spec := getattr(arguments, flag, None):
                model.open(spec)
        raise Reached

    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, 'parse', parse_and_stop)
        patch.setattr(command, 'load', load_and_stop)
        try:
            call(program, *words)
        except Reached:
            return True
    return False


def test_documented_commands_are_taken(places, monkeypatch, capsys):
    wrong, count = [], 0
    for document, program, words in commands():
        if program in ('scripts/launch_local.py', 'scripts/evaluate_torch.py'):
            continue  # their own parsers take what main takes, and files of PyTorch
        if program.endswith('.') or (program == 'swav_jax.main' and words in ('', '--help')):
            continue  # a sentence
        variants = [words]
        if program.startswith('swav_jax.evaluate') and not words:
            data = '' if program.endswith(('clusters', 'features', 'report')) else LABELLED
            out = ' --out new' if program.endswith(('clusters', 'features')) else ''
            variants = [f'--workdir RUN{data}{out}']
            if not program.endswith('report'):
                variants.append(f'--weights FILE --config FILE{data}{out}')
        for variant in variants:
            count += 1
            if not taken(program, filled(variant, places), monkeypatch):
                wrong.append((document, program, words, capsys.readouterr().err))
    assert not wrong, '\n'.join(map(str, wrong))
    assert count > 50


LABELLED = ' --train folder:/imagenet/train --test folder:/imagenet/val'
WORD = re.compile(
    r'\b(?:\d+x\d+(?:\+\d+x\d+)*|head\d+|proto\d+k|\d+-32x\d+d|\d\w+[mg]f|vissl|'
    r'(?:half|full)(?:_\w+)?|[1-9]00)(?![\w/-])'
)


def documented_settings():
    """(document, FILE:WORDS and flags) of each config file that is named with what follows it."""
    for name in ('README.md', 'docs/recipes.md'):
        file = 'swav_r50.py'
        for line in (ROOT / name).read_text().splitlines():
            for code in re.findall(r'`([^`]+)`', line.replace('--config ', '')):
                if found := re.fullmatch(r'(?:configs/)?(swav_\w+\.py)(:\S+)?( --.*)?', code):
                    file = found[1]
                    yield name, f'{file}{found[2] or ""}{found[3] or ""}'
                elif re.fullmatch(r':[\w.,+-]+', code) and '|' in line:
                    yield name, file + code
            file = 'swav_r50.py' if not line.startswith('|') else file
    for path in sorted((ROOT / 'configs').glob('*.py')):
        text = ast.get_docstring(ast.parse(path.read_text()))
        yield path.name, path.name
        for found in re.finditer(r'configs/(\w+\.py:[^\s`]*[\w])', text):
            yield path.name, found[1]
        for word in WORD.findall(text.partition('Words after a colon')[2].partition('\n\n')[0]):
            yield path.name, f'{path.name}:{word}'


def test_documented_settings_load():
    """Words after a colon, alone and combined, and the flags beside them."""
    found = set(documented_settings())
    words = {line.partition(' ')[0].partition(':')[2] for _, line in found}
    assert words >= {'', '100', '200', '800', '2x224', '2x160+4x96', '6x160', 'head3', 'head4096',
                     'proto16k', 'vissl', 'full', 'half_warmup', '101-32x8d', '3_2gf',
                     '200,2x160+4x96'}  # fmt: skip
    for document, line in sorted(found):
        spec, *flags = line.split()
        config = main.parse([f'--config=configs/{spec}', *flags]).config
        settings.validate(config)
        assert document and config.optimizer.num_epochs


def test_a_plan_and_a_page_of_settings_are_whole(capsys):
    assert call('swav_jax.main', '--config=scripts/tiny.py', '--plan', '--replicas=2') == 0
    assert 'steps ' in capsys.readouterr().out
    assert call('swav_jax.main', '--help', '--config', 'configs/swav_r50.py:800') == 0
    assert '--config.optimizer.num_epochs=800' in capsys.readouterr().out
