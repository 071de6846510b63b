"""The page and the JSON over several runs, made from what runs write."""

import json
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from processes import ROOT, run
from rich.console import Console

from configs import demo
from swav_jax.config import trunks
from swav_jax.evaluate import compare, figures
from swav_jax.runs.monitor import Monitor
from swav_jax.runs.workdir import write_config


def write_run(folder, *, loss=3.0, top1=80.0, steps=30, end=None, prototypes=30, change=None):
    """What a run leaves in its folder; it is not finished if `end` comes before `steps`."""
    folder.mkdir(parents=True)
    config = demo.get_config()
    if change:
        change(config)
    write_config(config, folder)
    sizes = dict(total_steps=steps, steps_per_epoch=10, batch_size=8, num_prototypes=prototypes)
    with Monitor(folder, log_every_steps=2, console=Console(quiet=True), **sizes) as monitor:
        if top1:
            monitor.events({'knn_top1_untrained': 61.5, 'nmi_untrained': 0.0625}, 0)
        for step in range(1, (end or steps) + 1):
            names = ('active_prototypes', 'code_entropy', 'embedding_std', 'grad_norm')
            metrics = {'loss': loss + 1 / step, 'lr': 0.1} | dict.fromkeys(names, 1.0 + 1 / step)
            monitor.record(step, {name: jnp.float32(x) for name, x in metrics.items()})
        summary = {}
        if top1:
            summary = {'knn_top1': top1, 'nmi': 0.5}
            monitor.events(summary, end or steps)
        monitor.flush()
        if not end:
            monitor.finish(summary)
    return folder


def set_epsilon(config):
    config.loss.epsilon = 0.07


def command(*words):
    """Run the command; returns its exit code."""
    return compare.main([str(word) for word in words])


def table(text):
    """The texts in the lines of a page's first table, by their first words."""
    rows = re.findall(r'<tr>(.*?)</tr>', text.partition('</table>')[0], re.DOTALL)
    cells = [re.findall(r'<t[hd].*?>(.*?)</t[hd]>', row, re.DOTALL) for row in rows]
    plain = [[' '.join(re.sub(r'<[^>]*>', ' ', cell).split()) for cell in row] for row in cells]
    return {first.partition(' ')[0]: others for first, *others in plain}


def marked(text):
    return re.findall(r'<td class="best"><b>(.*?)</b>', text)


@pytest.fixture
def two(tmp_path):
    return [
        write_run(tmp_path / 'first', loss=3.0, top1=80.0),
        write_run(tmp_path / 'second', loss=3.2, top1=90.0, prototypes=300, change=set_epsilon),
    ]


def test_the_page_has_the_final_figures_and_marks_the_best(two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*two) == 0
    assert capsys.readouterr().out == 'written to compare.html\n'
    text = (tmp_path / 'compare.html').read_text()
    found = table(text)
    assert found['run'] == [
        'epochs', 'loss / ln K', 'kNN top-1', 'NMI of prototypes and labels', 'images/s',
    ]  # fmt: skip
    shares = [(3.0 + 1 / 30) / np.log(30), (3.2 + 1 / 30) / np.log(300)]
    for name, share, top1 in zip(('first', 'second'), shares, (80, 90), strict=True):
        expected = ['3', f'{share:.3f}', f'{top1:.1f}% 61.5% untrained', '0.500 0.062 untrained']
        assert found[name][:4] == expected
    assert {f'{shares[1]:.3f}', '90.0%'} <= set(marked(text)), 'not the lower loss'
    assert len(marked(text)) == 3, 'and a speed, but no NMI: they are equal'
    for title in ('Loss / ln K', 'kNN top-1, percent', 'NMI', 'Learning rate',
                  'Prototypes in use, in a batch', 'Entropy of the codes',
                  'Spread of the embeddings', 'Norm of the gradient'):  # fmt: skip
        assert text.count(f'alt="{title}"') == 1
    assert not re.findall(r'(?:src|href)="(?!data:)', text)


def test_an_unfinished_run_is_shown_by_its_last_row(tmp_path, capsys):
    folders = [write_run(tmp_path / name, loss=2, end=end) for name, end in (('a', 8), ('b', None))]
    assert command(*folders, '--out', tmp_path / 'x.html') == 0
    found = table((tmp_path / 'x.html').read_text())
    assert found['a'][:3] == ['0.8', f'{2.125 / np.log(30):.3f}', '80.0% 61.5% untrained']
    # A finished run that was continued: its summary.json is of the earlier end.
    (folders[0] / 'summary.json').write_text('{"steps": 4, "knn_top1": 1, "images_per_second": 7}')
    assert command(*folders, '--json') == 0
    first, second = json.loads(capsys.readouterr().out.partition('\n')[2])['runs']
    assert (first['finished'], second['finished']) == (False, True)
    assert command(*folders, '--out', tmp_path / 'y.html') == 0
    text = (tmp_path / 'y.html').read_text()
    assert table(text)['a'] == found['a']
    assert 'not finished, step 8<' in text and text.count('not finished') == 1


def test_a_run_without_evaluation_or_with_a_loss_that_is_not_finite(tmp_path):
    folders = [write_run(tmp_path / 'a', top1=None, loss=np.nan), write_run(tmp_path / 'b')]
    assert command(*folders, '--out', tmp_path / 'x.html') == 0
    text = (tmp_path / 'x.html').read_text()
    assert table(text)['a'][:4] == ['3', 'not finite', '–', '–']
    assert '80.0%' not in marked(text), 'the only value is not the best one'
    last = json_of(*folders)['runs'][0]['last']
    assert last['loss'] is None and last['grad_norm'] > 1


def json_of(*folders):
    """The JSON object, which has to be strict."""

    def refuse(constant):
        raise AssertionError(constant)

    runs = [compare.read(folder, folder.name) for folder in folders]
    return json.loads(json.dumps(compare.as_json(runs)), parse_constant=refuse)


def another_trunk(config):
    config.choices = (('config.model.trunk.w_0', 'a reason is no setting'),)
    config.model.trunk = trunks.section('regnet', depth=1, w_0=8, w_m=2.0, group_width=4)
    config.optimizer.param_schedulers.lr.schedulers[0].start_value = 0.5


def test_settings_that_differ_and_no_others(tmp_path):
    folders = [write_run(tmp_path / f'{i}', end=2) for i in range(3)]
    folders.append(write_run(tmp_path / 'odd', end=2, change=another_trunk))
    found = compare.differences([compare.read(folder, folder.name) for folder in folders])
    start = 'config.optimizer.param_schedulers.lr.schedulers[0].start_value'
    assert found[start][:3] == [found[start][0]] * 3 and found[start][3] == '0.5'
    assert found['config.model.trunk.w_0'] == [None, None, None, '8']
    assert {name for name in found if not name.startswith('config.model.trunk.')} == {start}
    assert command(*folders, '--out', tmp_path / 'x.html') == 0
    text = (tmp_path / 'x.html').read_text()
    row = next(x for x in text.split('<tr>') if 'schedulers[0]' in x)
    assert row.count('class="other"') == 1 and '<td class="other"><div>0.5</div></td>' in row
    assert command(*folders[:3], '--out', tmp_path / 'x.html') == 0
    assert 'All settings are the same.' in (tmp_path / 'x.html').read_text()


def test_json_is_for_scripts(two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*two, '--json') == 0
    found = json.loads(capsys.readouterr().out)
    assert found['settings'] == ['config.loss.epsilon']
    first, second = found['runs']
    assert first['name'] == 'first' and first['folder'] == str(two[0])
    assert first['settings'] == {'config.loss.epsilon': 0.03}
    assert second['settings'] == {'config.loss.epsilon': 0.07}
    assert second['summary'] == json.loads((two[1] / 'summary.json').read_text())
    assert second['last']['step'] == 30 and second['last']['knn_top1'] == 90
    assert second['last']['knn_top1_untrained'] == 61.5
    assert {path.name for path in tmp_path.iterdir()} == {'first', 'second'}, 'no page'
    assert command('--json', two[0], '--out', tmp_path / 'new' / 'x.html', two[1]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert 'second' in (tmp_path / 'new' / 'x.html').read_text()


@pytest.mark.parametrize(
    ('folders', 'names'),
    [
        ('/x/a /x/b', 'a b'),
        ('/x/run /y/run /y/b', 'x/run y/run b'),
        ('/x/1/run /x/2/run /y/2/run', '1/run x/2/run y/2/run'),
        ('/run /x/run', '/run x/run'),
    ],
)
def test_labels_tell_runs_apart(folders, names):
    assert compare.labels([ROOT / folder for folder in folders.split()]) == names.split()


def test_mistakes_are_one_line(two, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = two
    (tmp_path / 'link').symlink_to(first)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('x')
    before = sorted(tmp_path.rglob('*'))
    for words, line in (
        ([], 'RUN is missing'),
        ([first], 'a second RUN is missing'),
        ([first, tmp_path / 'none'], 'none holds no metrics.jsonl: name the folder of a run'),
        ([first, 'empty'], 'empty holds no metrics.jsonl'),
        ([first, 'file'], 'file holds no metrics.jsonl'),
        ([first, 'link'], f'{first} and link are the same folder'),
        ([first, second, 'second/../second'], 'are the same folder'),
        ([*two, '--out', first / 'metrics.jsonl'], '--out='),
        ([*two, '--out', first], '--out='),
        ([*two, '--workdir', first], "'--workdir' is not known"),
    ):
        assert command(*words) == 2, words
        out, error = capsys.readouterr()
        assert error.startswith('error: ') and line in error and error.count('\n') == 1 and not out
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    'text',
    [
        '',
        '[]',
        '5\n"x"\nnull\n[1]\n{}\n',
        '{"step": 1, "epoch": 0.1, "loss": 3, "lr": -1, "loss_over_ln_k": 0, "nmi": true}\n',
        '{"step": 2, "epoch": 1e308, "loss_over_ln_k": 1e299, "lr": 1e299, "nmi": 1e299}\n',
        '{"step": 3, "epoch": -5, "loss_over_ln_k": -3}\n{"step": 1, "epoch": -9, "nmi": 1e99}',
        '{"step": 3, "epoch": null, "loss_over_ln_k": null, "_x": 1, "$x_{$": 2, "<b>": 3}\n',
        '{"model": 3, "data": {}, "x": NaN, "<b>": [Infinity, {"y": 1e400}]}',
        '{"steps": "many", "knn_top1": null, "nmi": [1], "epochs": {}, "loss_last": 1e400}',
        '{"steps": %s, "loss_last": 2}' % ('9' * 400),
        '[' * 3000,
        '{"a": ' * 200 + '1' + '}' * 200,
        '{"a": ',
        '\x00\x00\x00',
        b'\xff\xfe\x00\xd8',
    ],
)
def test_damaged_records_leave_a_page_of_the_rest(tmp_path, capsys, text):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / 'a').mkdir()
    for name in ('metrics.jsonl', 'events.jsonl', 'summary.json', 'config.json'):
        (tmp_path / 'a' / name).write_bytes(content)
    sound = write_run(tmp_path / 'b')
    assert command(tmp_path / 'a', sound, '--out', tmp_path / 'x.html') == 0
    out, error = capsys.readouterr()
    assert all(line.startswith('note: ') and 'is left out (' in line for line in error.splitlines())
    assert out.count('\n') == 1
    text = (tmp_path / 'x.html').read_text()
    assert table(text)['b'][2] == '80.0% 61.5% untrained' and 'Loss / ln K' in text
    assert '<b>' not in re.sub('<td class="best"><b>', '', text)
    assert len(json_of(tmp_path / 'a', sound)['runs']) == 2


def test_a_missing_config_is_no_difference(two):
    (two[1] / 'config.json').unlink()
    found = json_of(*two)
    assert found['settings'] == [] and found['runs'][1]['settings'] is None
    text = compare.page([compare.read(folder, folder.name) for folder in two])
    assert 'No differences: config.json can be read in 1 of 2 runs.' in text


def test_records_that_are_no_files_are_left_out(two, capsys):
    """Opening a pipe would wait for ever."""
    for name in ('config.json', 'events.jsonl', 'summary.json'):
        (two[0] / name).unlink()
    (two[0] / 'config.json').mkdir()
    os.mkfifo(two[0] / 'events.jsonl')
    os.mkfifo(two[0] / 'summary.json')
    assert json_of(*two)['runs'][0]['summary'] == {}
    assert capsys.readouterr().err.count('is left out (it is a ') == 2


def test_nothing_heavy_is_imported(two, tmp_path):
    code = (
        'import sys\n'
        'from swav_jax import commands\n'
        'assert commands.main(["compare", *sys.argv[1:]]) == 0\n'
        'heavy = {"jax", "tensorflow", "torch", "orbax", "flax"} & sys.modules.keys()\n'
        'assert not heavy, heavy\n'
    )
    words = [*map(str, two), f'--out={tmp_path}/x.html']
    done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_curves_of_many_runs_look_different():
    assert len({figures.line_style(place) for place in range(32)}) == 32
    rows = [[{'epoch': 0.0, 'x': i}, {'epoch': 1.0, 'x': i + 1}] for i in range(20)]
    figure = figures.compared([[], *rows], 'x', 'X')
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    looks = {(line.get_color(), line._unscaled_dash_pattern) for line in lines}
    assert len(lines) == len(looks) == 20
    assert lines[0].get_color() == figures.line_style(1)[0], 'a run without it keeps its place'
    assert figures.compared([[], [{'epoch': 1.0}]], 'x', 'X') is None


def test_a_long_curve_keeps_its_mean_and_its_last_value():
    values = np.random.default_rng(0).standard_normal(2991)
    rows = [{'epoch': float(i), 'x': x} for i, x in enumerate(values)]
    figure = figures.compared([rows, rows[:2]], 'x', 'X')
    x, y = figure.axes[0].lines[0].get_data()
    assert len(x) == 300 and (x[-1], y[-1]) == (2990, values[-1])
    np.testing.assert_allclose(y[:-1].mean(), values[:-1].mean())
    assert len(figures.svg(figure)) < 100_000
    assert figure.axes[0].lines[2].get_xdata().tolist() == [0, 1], 'a short one is not changed'


@pytest.fixture(scope='module')
def twenty(tmp_path_factory):
    """A page of twenty runs, with names of all kinds."""
    root = tmp_path_factory.mktemp('twenty')
    names = ['<b>&"', '$x_{$', 'x' * 200, 'café 猫', *(f'resnet18_lr{i}_seed0' for i in range(16))]

    def change(i):
        def do(config):
            config.seed = i
            config.data.source = 'folder:/a/long/path/to/images/train' if i % 5 == 0 else 'demo'
            config.loss.epsilon = 0.05 if i % 2 else 0.03

        return do

    folders = [
        write_run(root / name, loss=3 + i / 9, top1=70 + i, steps=30 + 20 * i, change=change(i))
        for i, name in enumerate(names)
    ]
    assert command(*folders, '--out', root / 'x.html') == 0
    return root / 'x.html'


@pytest.mark.parametrize(
    ('width', 'phone', 'media'), [(1280, False, 'screen'), (390, True, 'screen'), (718, 0, 'print')]
)
def test_a_browser_shows_twenty_runs(twenty, chromium, width, phone, media):
    size = {'width': width, 'height': 900}
    page = chromium.new_page(viewport=size, is_mobile=bool(phone), device_scale_factor=1 + phone)
    page.emulate_media(media=media)
    said, requests = [], []
    page.on('console', lambda message: said.append(message.text))
    page.on('request', lambda request: requests.append(request.url))
    page.goto(twenty.as_uri())
    assert not said
    assert [url for url in requests if not url.startswith('data:')] == [twenty.as_uri()]
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.evaluate('document.images.length') == 8
    assert page.evaluate('[...document.images].every(image => image.naturalWidth)')
    assert page.locator('.legend').count() == 1 and page.locator('.legend li').count() == 20
    looks = '[...document.querySelectorAll(".legend line")].map(x => x.outerHTML)'
    assert len(set(page.evaluate(looks))) == 20
    left = '(() => document.querySelector(".settings tbody th").getBoundingClientRect().left)()'
    before = page.evaluate(left)
    scrolled = page.evaluate(
        '(() => {const box = document.querySelector(".settings"); box.scrollLeft = 300; '
        'return box.scrollLeft})()'
    )
    assert scrolled == (0 if media == 'print' else 300)
    assert page.evaluate(left) == before, 'the names of the settings stay'
    assert page.pdf().startswith(b'%PDF')


@pytest.mark.slow
def test_runs_of_the_training_command(tmp_path, capsys):
    """Two real trainings, one of which stops earlier."""
    flags = ['--config.train.max_steps=4', '--config.evaluate.train_source=demo:test',
             '--config.evaluate.test_source=demo:test']  # fmt: skip
    for name, more in (
        ('a', ['--config.loss.epsilon=0.07']),
        ('b', ['--config.train.max_steps=2']),
    ):
        done = run(tmp_path / name, *flags, *more)
        assert done.returncode == 0, done.stderr
    assert command(tmp_path / 'a', tmp_path / 'b', '--json', '--out', tmp_path / 'x.html') == 0
    found = json.loads(capsys.readouterr().out)
    assert found['settings'] == ['config.loss.epsilon', 'config.train.max_steps']
    assert [run['last']['step'] for run in found['runs']] == [4, 2]
    for run_, name in zip(found['runs'], 'ab', strict=True):
        assert run_['finished']
        assert run_['summary'] == json.loads((tmp_path / name / 'summary.json').read_text())
        assert run_['last']['knn_top1'] == run_['summary']['knn_top1']
    assert table((tmp_path / 'x.html').read_text())['b'][0] == '0.25'
