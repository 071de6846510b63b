"""The report of a run: right, whole in one file, and as a browser shows it."""

import functools
import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.manifold import trustworthiness

from configs import demo
from swav_jax import config as settings
from swav_jax.data import sources
from swav_jax.data.images import ArraySource
from swav_jax.evaluate import figures, gallery, metrics, online, page, reference, report
from swav_jax.evaluate.extraction import Features


def features_of(source, seed=0, prototypes=9):
    """Features of images that are their pixels, and prototypes that are some of the images."""
    pixels = np.stack([gallery.thumbnail(source, i, 8)[..., 0] for i in range(len(source))])
    x = pixels.reshape(len(source), -1).astype(np.float32)
    x = (x - x.mean(0)) / np.linalg.norm(x - x.mean(0), axis=1, keepdims=True)
    chosen = np.random.default_rng(seed).choice(len(source), prototypes, replace=False)
    readable = np.ones(len(source), bool)
    return Features(x, x, (x @ x[chosen].T,), source.labels, readable)


def write_log(workdir):
    """What a run of 30 steps leaves behind, but for the checkpoints."""
    rows = [
        {
            'step': s,
            'epoch': s / 10,
            'loss': None if s == 15 else 3 - s / 50,
            'lr': 0.1,
            'images_per_second': 100.0,
            'data_wait': 0.0,
            'loss_over_ln_k': (3 - s / 50) / 3.4,
            'code_entropy': 2.0,
            'active_prototypes': 20.0,
        }
        for s in (1, 10, 15, 20, 30)
    ]
    events = [{'step': 0, 'epoch': 0.0, 'knn_top1_untrained': 60.0}]
    events.append({'step': 30, 'epoch': 3.0, 'knn_top1': 81.25, 'nmi': 0.5})
    for name, lines in (('metrics', rows), ('events', events)):
        (workdir / f'{name}.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
    config = settings.to_dict(demo.get_config())
    config['data']['source'] = 'folder:/<b>&'
    (workdir / 'config.json').write_text(json.dumps(config))
    summary = {'steps': 30, 'epochs': 3.0, 'loss_last': 2.4, 'loss_last_over_ln_k': 0.7}
    summary |= {'knn_top1': 81.25, 'knn_top1_untrained': 60.0, 'images_per_second': 100.0}
    (workdir / 'summary.json').write_text(json.dumps(summary))


@pytest.fixture(scope='module')
def crops():
    source = sources.open_source('demo', limit=100, channels=1)
    return gallery.crops(source, demo.get_config(), images=3)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, crops):
    workdir = tmp_path_factory.mktemp('report') / 'a run'
    workdir.mkdir()
    write_log(workdir)
    source = sources.open_source('demo:test', limit=200, channels=1)
    found = features_of(source)
    report.draw_loss(workdir)
    report.draw_prototypes(workdir, found, source)
    report.write(workdir, found, source, crops)
    return workdir


def test_the_page_tells_what_the_run_did(workdir):
    page = (workdir / 'report.html').read_text()
    for text in (
        '81.2%',
        'kNN top-1, 60.0% untrained',
        '2.40',
        '70% of ln K',
        'Prototypes',
        'Coat',
    ):
        assert text in page
    assert 'trained on folder:/&lt;b&gt;&amp;' in page, 'what the user wrote is text, not markup'
    for title in ('Loss', 'kNN top-1, percent', 'Entropy of the codes', 'Map of the embeddings'):
        assert f'alt="{title}"' in page
    assert page.count('alt="crop"') == 3 * 6
    assert 'config.loss.epsilon' in page


def reference_of(folder, **changes):
    """Write reference curves to compare the run of `write_log` with."""
    config = settings.to_dict(demo.get_config())
    config['data']['source'] = 'folder:/<b>&'
    content = {
        'recipe': 'demo',
        'version': '0.1',
        'machine': 'a CPU',
        'command': 'python scripts/reference.py demo',
        'seeds': [0, 1, 2, 3, 4],
        'config': config,
        'steps_per_epoch': 10,
        'curves': {
            'loss_over_ln_k': [[1, 0.8, 0.82, 0.9], [2, 0.76, 0.77, 0.8], [3, 0.7, 0.71, 0.8]],
            'active_prototypes': [[1, 25, 26, 27], [2, 25, 26, 27], [3, 25, 26, 27]],
            'knn_top1': [[0, 59, 60, 61], [3, 70, 71, 72]],
        },
    } | changes
    (folder / 'demo.json').write_text(json.dumps(content))


def report_of(workdir, found, source, images=None):
    """The text of the section of signs and bands, or None, and what is missing."""
    missing = report.write(workdir, found, source, images=images)
    page = (workdir / 'report.html').read_text()
    section = re.search('<h2>Is this run normal.</h2>(.*?)<h2>', page, re.S)
    return section and ' '.join(re.sub('<.*?>', '', section[1]).split()), missing


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A run's folder, features, and the folder where reference curves are looked for."""
    source, found = small_features(3)
    folder = tmp_path / 'reference'
    folder.mkdir()
    read = functools.partial(reference.read, folder=folder)
    monkeypatch.setattr(reference, 'read', read)
    write_log(tmp_path)
    return tmp_path, found, source, folder


def test_a_run_is_compared_with_its_recipe(logged):
    workdir, found, source, folder = logged
    reference_of(folder)
    text, missing = report_of(workdir, found, source)
    assert not missing
    assert text.startswith('2 of 3 curves lie outside the bands of 5 runs of the recipe demo')
    assert 'Loss / ln K: inside the band.' in text
    assert 'Prototypes in use, in a batch: below the band. That usually means:' in text
    assert 'kNN top-1, percent: above the band from epoch 3 on' in text
    assert 'other settings' not in text and 'shows no sign' in text


def test_other_settings_make_it_a_comparison(logged):
    workdir, found, source, folder = logged
    config = settings.to_dict(demo.get_config())
    config['loss']['epsilon'], config['seed'] = 0.123, 9
    config['data']['source'] = 'folder:/<b>&'
    reference_of(folder, config=config, steps_per_epoch=20)
    text, _ = report_of(workdir, found, source)
    epsilon = demo.get_config().loss.epsilon
    assert f'not a test: config.loss.epsilon: {epsilon} instead of 0.123' in text
    assert 'steps of an epoch: 10 instead of 20' in text and 'config.seed' not in text


def test_signs_of_trouble_are_named(logged):
    """The batch over all devices is known from the number of images and of steps."""
    workdir, found, source, _ = logged
    config = settings.to_dict(demo.get_config())
    config['model']['head']['num_clusters'] = [600]
    config['data']['batchsize_per_replica'] = 64
    config['recipe'] = 'mine'
    (workdir / 'config.json').write_text(json.dumps(config))
    text, missing = report_of(workdir, found, source, images=10 * 128 + 5)
    assert not missing and 'There are no reference curves of the recipe mine.' in text
    assert 'More prototypes than the batch can fill: 128 images (batch and queue)' in text
    assert 'docs/learning.md' in text and 'config.model.head.num_clusters' in text
    text, _ = report_of(workdir, found, source, images=10 * 320)
    assert 'More prototypes' not in text, '5 devices fill them'


def test_damaged_reference_curves_are_left_out(logged):
    workdir, found, source, folder = logged
    (folder / 'demo.json').write_text('{"curves": ')
    text, missing = report_of(workdir, found, source)
    assert len(missing) == 1 and "reference curves of 'demo' are damaged" in missing[0]
    assert 'shows no sign' in text
    assert 'alt="Loss"' in (workdir / 'report.html').read_text()


def test_a_run_without_a_log_is_not_judged(tmp_path):
    source, found = small_features(3)
    assert report_of(tmp_path, found, source) == (None, [])


def test_the_band_is_drawn_where_the_other_runs_were():
    rows = [{'epoch': e, 'nmi': e / 10} for e in (0, 1, 2)]
    band = np.array([[0, 0.0, 0.1, 0.2], [1, 0.3, 0.4, 0.5], [2, 0.6, 0.7, 0.8], [9, 7, 8, 9]])
    (axes,) = figures.metric(rows, 'nmi', 'NMI', band=band).axes
    (filled,) = axes.collections
    vertices = {tuple(np.round(v, 6)) for v in filled.get_paths()[0].vertices}
    assert vertices == {tuple(v) for e, low, _, high in band[:3] for v in ((e, low), (e, high))}
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.1, 0.4, 0.7])
    assert axes.get_ylim()[1] < 2, 'what lies beyond the run does not set the scale'
    assert not figures.metric(rows, 'nmi', 'NMI').axes[0].collections


def test_the_band_of_the_loss_has_the_height_of_the_loss(monkeypatch):
    """Reference curves have the mean of loss / ln K over an epoch; the page draws the loss."""
    drawn = {}

    def metric(rows, name, title, reference=None, label='', band=None):
        drawn[name] = band

    monkeypatch.setattr(figures, 'metric', metric)
    curve = np.array([[1, 0.5, 0.6, 0.7]])
    curves = {'loss_over_ln_k': curve, 'knn_top1': curve}
    recipe = reference.Reference('x', '1', 'm', 'c', (0,), {}, 10, curves)
    rows = [{'epoch': 1.0, 'loss': 3.0, 'loss_over_ln_k': 0.75, 'lr': 0.1}]
    page.curves(rows, [], {}, recipe)
    np.testing.assert_allclose(drawn['loss'], [[0.5, 2.0, 2.4, 2.8]])
    np.testing.assert_allclose(drawn['knn_top1'], curve)
    assert drawn['lr'] is None


def test_the_page_needs_no_other_file(workdir):
    page = (workdir / 'report.html').read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert not re.findall(r'https?://', page)
    assert len(page) < 3_000_000


def test_pictures(workdir):
    for name in ('loss', 'prototypes', 'map'):
        with Image.open(workdir / f'{name}.png') as image:
            assert image.format == 'PNG'
            assert min(image.size) > 300
            assert len(image.convert('L').getcolors()) > 100, 'something is drawn'
    left = {
        path.name for path in workdir.iterdir() if path.suffix not in ('.png', '.json', '.jsonl')
    }
    assert left == {'report.html'}


@pytest.mark.parametrize(('width', 'phone'), [(1280, False), (390, True)])
def test_a_browser_shows_it(workdir, chromium, width, phone):
    size = {'width': width, 'height': 900}
    page = chromium.new_page(viewport=size, is_mobile=phone, device_scale_factor=1 + phone)
    said, requests = [], []
    page.on('console', lambda message: said.append(message.text))
    page.on('pageerror', lambda error: said.append(error.message))
    page.on('request', lambda request: requests.append(request.url))
    page.goto((workdir / 'report.html').as_uri())
    assert not said
    assert [url for url in requests if not url.startswith('data:')] == [
        (workdir / 'report.html').as_uri()
    ]
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.evaluate('document.images.length') > 100
    assert page.evaluate('[...document.images].every(image => image.naturalWidth)')
    lines = page.evaluate(
        '[...document.querySelectorAll(".strip")].map(strip => new Set('
        '[...strip.querySelectorAll(".thumb")].map(image => image.offsetTop)).size)'
    )
    assert max(lines) == 1, 'a prototype takes one line'
    assert page.pdf().startswith(b'%PDF')


def test_a_name_as_long_as_it_likes_makes_no_page_wider(chromium, tmp_path):
    source, found = small_features(4, labels=[0, 0, 1, 1], names=['x' * 300, '<b>&"'])
    report.write(tmp_path, found, source)
    page = chromium.new_page(viewport={'width': 390, 'height': 900}, is_mobile=True)
    page.goto((tmp_path / 'report.html').as_uri())
    assert page.evaluate('document.documentElement.scrollWidth') <= 390


def test_the_page_shows_a_measure_that_it_does_not_know(tmp_path):
    """What another version of the program has measured, by the name in events.jsonl."""
    write_log(tmp_path)
    with (tmp_path / 'events.jsonl').open('a') as file:
        for epoch, name in ((0, '$x_{$_untrained'), (2, '$x_{$'), (3, '$x_{$'), (3, '<b>')):
            file.write(json.dumps({'step': 1, 'epoch': epoch, name: 0.5 + epoch / 4}) + '\n')
    summary = json.loads((tmp_path / 'summary.json').read_text())
    summary |= {'$x_{$': 1.25, '$x_{$_untrained': 0.5}
    (tmp_path / 'summary.json').write_text(json.dumps(summary))
    source, found = small_features(3)
    assert report.write(tmp_path, found, source) == []
    page = (tmp_path / 'report.html').read_text()
    assert 'alt="$x_{$"' in page and 'alt="&lt;b&gt;"' in page
    assert '<b>1.25</b><span>$x_{$, 0.5 untrained</span>' in page


def test_the_report_of_an_evaluation_is_what_the_registry_says():
    named = [name for kind in online.EVALUATIONS.values() for name in kind.metrics]
    assert sorted(named) == sorted(metrics.METRICS), 'each has a title, and there are no others'
    rows = [{'step': 1, 'epoch': 0.0, 'nmi': 1.0, 'knn_top1_untrained': 1, 'knn_top1_pixels': 2}]
    assert metrics.measured(rows) == metrics.METRICS


def test_a_report_of_little(tmp_path):
    """No log, no labels, one image that cannot be read, a class without a name."""
    images = np.random.default_rng(0).integers(0, 255, (12, 9, 7, 3), np.uint8)
    source = ArraySource('x', images)
    found = features_of(source, prototypes=3)
    found.readable[4] = False
    report.draw_loss(tmp_path)
    report.write(tmp_path, found, source)
    page = (tmp_path / 'report.html').read_text()
    assert 'Prototypes' in page
    assert 'another class' not in page
    assert 'x[4]' not in page
    assert not (tmp_path / 'loss.png').exists()
    headless = Features(found.trunk, None, (), np.arange(12), found.readable)
    report.write(tmp_path, headless, source)
    assert 'Prototypes' not in (tmp_path / 'report.html').read_text()
    one = Features(found.trunk[:1], None, (), None, np.ones(1, bool))
    report.write(tmp_path, one, source.take([0]))


def test_tensorboard_has_images_and_a_projector(tmp_path):
    source = sources.open_source('demo:test', limit=30, channels=1)
    report.write_tensorboard(tmp_path, features_of(source), source, 7)
    (folder,) = (tmp_path / 'tensorboard').glob('*/default')
    vectors = np.loadtxt(folder / 'tensors.tsv')
    assert vectors.shape == (25, 64), 'a square of images'
    lines = (folder / 'metadata.tsv').read_text().splitlines()
    assert len(lines) == 25
    assert lines[0] == f'{source.class_names[source.labels[0]]} demo:test[0]'
    with Image.open(folder / 'sprite.png') as sprite:
        assert sprite.size == (32 * 5, 32 * 5)
    assert 'tensors.tsv' in (tmp_path / 'tensorboard' / 'projector_config.pbtxt').read_text()


def test_a_gallery_shows_the_largest_prototypes_and_their_nearest_images():
    images = np.zeros((8, 4, 4, 1), np.uint8)
    source = ArraySource('x', images, [0, 0, 1, 1, 1, 2, 2, 0], ['cat', 'dog', 'cow'])
    scores = np.full((8, 5), -1.0)
    scores[[0, 1, 2], 3] = [0.5, 0.9, 0.1]
    scores[[3, 4, 5, 6], 1] = [0.2, 0.3, 0.4, 0.1]
    scores[7, 0] = 0.9
    found = Features(np.zeros((8, 2)), None, (scores,), source.labels, np.arange(8) < 7)
    first, second = gallery.prototypes(found, source, most=5, images=3)
    assert (first['prototype'], first['size'], first['label'], first['share']) == (1, 4, 'dog', 0.5)
    assert first['nearest'].tolist() == [5, 4, 3]
    assert (second['prototype'], second['size'], second['label']) == (3, 3, 'cat')
    assert second['nearest'].tolist() == [1, 0, 2]
    found.labels = None
    assert 'label' not in gallery.prototypes(found, source, most=1, images=3)[0]


def test_neighbours_are_others_and_readable():
    x = np.eye(6, dtype=np.float32)[[0, 0, 0, 1, 1, 2]] + 0.01 * np.arange(6)[:, None]
    found = Features(x, None, (), np.array([0, 0, 0, 1, 1, 2]), np.arange(6) != 1)
    pairs = dict(gallery.neighbors(found, queries=5, images=2))
    assert sorted(pairs) == [0, 2, 3, 4, 5]
    assert pairs[0][0] == 2
    assert pairs[3][0] == 4
    assert all(query not in row and 1 not in row for query, row in pairs.items())


def test_crops_are_those_of_training(crops):
    shapes = [(16, 16, 1)] * 2 + [(10, 10, 1)] * 4
    assert [[crop.shape for crop in image] for image in crops] == [shapes] * 3
    assert all(crop.dtype == np.uint8 for image in crops for crop in image)
    assert np.std([image[0].mean() for image in crops]) > 1, 'of different images'


def test_a_thumbnail_is_the_middle_of_any_image(tmp_path):
    """Red left and right of a blue square, as a PNG with a palette; the margins are cut off."""
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20] = pixels[:, 40:] = (255, 0, 0)
    pixels[:, 20:40] = (0, 0, 255)
    Image.fromarray(pixels).convert('P').save(tmp_path / 'a.png')
    (tmp_path / 'b.png').write_bytes(b'not an image')
    source = sources.open_source(f'folder:{tmp_path}', channels=3)
    np.testing.assert_array_equal(gallery.thumbnail(source, 0, 8), np.full((8, 8, 3), (0, 0, 255)))
    assert len(np.unique(gallery.thumbnail(source, 1, 8))) == 1


def test_a_map_keeps_neighbours():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 20))[rng.integers(0, 6, 150)] + 0.3 * rng.standard_normal((150, 20))
    points = figures.tsne(x)
    assert trustworthiness(x, points) > 0.97
    np.testing.assert_array_equal(points, figures.tsne(x))
    assert np.isfinite(figures.tsne(np.ones((5, 3)))).all(), 'equal points are no trouble'


def small_features(count, *, labels=None, names=None, readable=None, channels=3, prototypes=4):
    """A source of random images and random features of it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (count, 8, 8, channels), np.uint8)
    source = ArraySource('x', images, labels, names)
    x = rng.standard_normal((count, 5)).astype(np.float32)
    readable = np.ones(count, bool) if readable is None else np.array(readable)
    return source, Features(x, x, (x @ x[:1].repeat(prototypes, 0).T,), source.labels, readable)


@pytest.mark.parametrize(
    'data',
    [
        dict(count=1),
        dict(count=2, labels=[0, 0], names=['only']),
        dict(count=6, labels=[-1, 0, 0, -1, 1, 0], names=['_a', '$b_{$']),
        dict(count=3, readable=[False] * 3, labels=[0, 1, 0], names='ab'),
        dict(count=3, readable=[False, True, False]),
        dict(count=2, channels=1),
        dict(count=2, channels=5),
    ],
)
def test_reports_of_odd_runs_are_whole(tmp_path, data):
    """One image, one prototype, no labels or some, nothing readable, other channels, no log."""
    source, found = small_features(**data)
    report.draw_loss(tmp_path)
    (tmp_path / 'map.png').write_text('of an earlier call')
    report.draw_prototypes(tmp_path, found, source)
    assert report.write(tmp_path, found, source) == []
    report.write_tensorboard(tmp_path, found, source, 0)
    readable = np.count_nonzero(found.readable)
    page = (tmp_path / 'report.html').read_text()
    assert f'shown with {readable} images' in page
    if readable < len(source):
        assert f'{len(source) - readable} more cannot be read' in page
    assert (tmp_path / 'prototypes.png').exists() == (readable > 0)
    assert (tmp_path / 'map.png').exists() == (readable >= 4), 'no picture of an earlier call'
    assert not (tmp_path / 'loss.png').exists()


NAMES = ['_cat', '$x_{$', 'a$b$c', 'café', '猫', '\\frac{', '\x1b[2J\n', '\udcff', 'x' * 300, '%s']


def test_names_are_drawn_as_they_are(tmp_path):
    """No mathematics, no label that the legend leaves out, no letter without which it fails."""
    labels = np.arange(30) % len(NAMES)
    source, found = small_features(30, labels=labels, names=NAMES, prototypes=20)
    found.scores = (np.eye(30, dtype=np.float32)[:, :20],)
    report.draw_prototypes(tmp_path, found, source)
    points = np.random.default_rng(0).standard_normal((30, 2))
    names = [gallery.class_name(source, i) for i in range(len(NAMES))]
    figure = figures.point_map(points, np.where(labels == 3, -1, labels), names)
    report._save(figure, tmp_path / 'map.png')
    (legend,) = figure.legends
    told = [text.get_text() for text in legend.get_texts()]
    assert told == ['unknown', '_cat', '$x_{$', 'a$b$c', '猫', '\\frac{', *told[6:]]
    assert told[6] == r'\x1b[2J\n' and len(told[8]) == 20


@pytest.mark.parametrize(
    'text',
    [
        '[]',
        '5\n"x"\nnull\n[1]\n{}\n',
        '{"step": 1, "epoch": 0.1}\n{"epoch": 1, "loss": "3", "lr": null}\n',
        '{"step": 1, "epoch": 0.1, "loss": 3, "lr": 0.1}\n',
        '{"step": 1, "epoch": 0, "loss": 3, "lr": -1, "loss_over_ln_k": 0, "nmi": true}\n',
        '{"epoch": NaN, "loss": Infinity}\n{"epoch": 1e308, "loss": 1e308, "nmi": 1e99}\n',
        '{"epoch": -5, "loss": -3, "lr": 0}\n{"epoch": -9, "loss": 1e99, "loss_over_ln_k": 1e-99}',
        '{"model": 3, "data": {}}',
        '{"model": {"trunk": {"name": 5}}, "data": {"num_crops": 3}}',
        '{"steps": "many", "knn_top1": null, "nmi": [1], "epochs": {}, "loss_last": 1e400}',
        '{"steps": %s, "loss_last": 2}' % ('9' * 400),
        '[' * 3000,
        '{"a": ',
        '\x00\x00\x00',
        b'\xff\xfe\x00\xd8',
    ],
)
def test_damaged_records_of_a_run_end_no_report(tmp_path, text):
    source, found = small_features(3, prototypes=1)
    content = text if isinstance(text, bytes) else text.encode()
    for name in ('metrics.jsonl', 'events.jsonl', 'summary.json', 'config.json'):
        (tmp_path / name).write_bytes(content)
    missing = report._Missing()
    missing.without('loss.png', lambda: report.draw_loss(tmp_path))
    missing += report.write(tmp_path, found, source)
    assert 'Nearest neighbours' in (tmp_path / 'report.html').read_text()
    assert any('config.json' in line for line in missing)
    assert not any('\n' in line for line in missing)


@pytest.mark.slow
def test_a_report_that_cannot_be_written_is_one_line(tmp_path, capsys):
    source, found = small_features(3)
    (tmp_path / 'report.html').mkdir()
    (tmp_path / 'report.html' / 'x').write_text('')
    (tmp_path / 'tensorboard').write_text('no folder')
    assert not report.write_all(tmp_path, found, source, source, demo.get_config(), 3)
    said = capsys.readouterr().err
    assert said.count('\n') == 1
    assert 'report.html (IsADirectoryError: Is a directory)' in said and 'tensorboard/ (' in said
