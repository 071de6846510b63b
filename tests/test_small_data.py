"""Recipes that look at the images: what they choose, and that the command line wins."""

import numpy as np
import pytest
from PIL import Image
from processes import ROOT, rows, run

from swav_jax import config as settings
from swav_jax import main, methods
from swav_jax.commands import plan
from swav_jax.config import small_data
from swav_jax.config.file import load_config, override
from swav_jax.data.survey import survey
from swav_jax.errors import UserError
from swav_jax.state import make_schedule

RECIPES = ('small_images', 'own_images')


def recipe(name, words='cpu', **flags):
    """The settings for some images; `flags` are settings with __ for dots."""
    changes = [(f'config.{key.replace("__", ".")}', str(value)) for key, value in flags.items()]
    config = override(load_config(f'{ROOT}/configs/{name}.py:{words}', changes), changes)
    settings.validate(config)
    return config


@pytest.mark.parametrize('name', RECIPES)
@pytest.mark.parametrize('words', ['cpu', '1', '8'])
@pytest.mark.parametrize('count', [64, 65, 300, 1000, 3000, 20_000, 200_000])
def test_what_is_chosen_for_any_number_of_images_fits_it(name, words, count):
    """No warning of the plan, and steps, queue and freeze that such a run has."""
    config = recipe(name, words, data__limit=count)
    replicas = 1 if words == 'cpu' else int(words)
    sizes = settings.sizes(config, num_images=count, num_devices=replicas)
    schedule = make_schedule(config, sizes)
    assert list(plan.warn(config, sizes, schedule)) == []
    method = methods.make(config)
    method.check()
    method.check_run(sizes)
    assert list(method.notes(sizes)) == []  # the queue is a multiple of the batch
    assert sizes.steps_per_epoch >= 4 and sizes.total_steps >= 30
    queue = config.loss.queue.queue_length
    assert queue < count / 2 and max(config.model.head.num_clusters) <= max(count / 20, 2)


def test_larger_sets_get_more_prototypes_and_fewer_epochs():
    sets = [recipe('own_images', '1', data__limit=n) for n in (1000, 10_000, 100_000, 1_000_000)]
    assert [c.model.head.num_clusters for c in sets] == [(30,), (100,), (1000,), (3000,)]
    assert [c.optimizer.num_epochs for c in sets] == [800, 800, 200, 100]
    assert [c.loss.queue.queue_length > 0 for c in sets] == [False, False, True, True]
    assert [c.model.trunk.depth for c in sets] == [18, 18, 50, 50]


@pytest.mark.parametrize(
    ('name', 'words', 'rows'), [('own_images', '1', 64), ('small_images', 'cpu', 64)]
)
def test_micro_batches_of_the_same_batch_are_the_same_recipe(name, words, rows):
    def chosen(turns):
        batch = dict(train__micro_batches=turns, data__batchsize_per_replica=rows // turns)
        config = recipe(name, words, data__limit=100_000, **batch).unlock()
        config.train.micro_batches, config.data.batchsize_per_replica = 1, rows
        del config.choices
        return settings.to_dict(config)

    assert chosen(4) == chosen(1)


def test_a_default_on_the_command_line_is_a_choice_too():
    config = recipe('own_images', '1', data__limit=100_000, model__head__num_clusters='(3000,)')
    assert config.loss.queue.queue_length == 3008
    config = recipe('small_images', data__limit=1000, optimizer__num_epochs=400)
    assert config.optimizer.param_schedulers.lr.lengths[0] == 0.025
    config = recipe('small_images', data__limit=1000, loss__epsilon=0.05)
    assert config.loss.epsilon == 0.05
    assert 'config.loss.epsilon' not in dict(config.choices)


def test_changed_parts_of_a_choice_are_followed():
    config = recipe('small_images', '1', **{'data__size_crops[0]': 88, 'data__limit': 1000})
    data = config.data
    assert (data.size_crops, data.canvas_size, config.evaluate.size) == ((88, 32), 88, 90)
    heads = recipe('small_images', data__limit=1000, model__head__num_clusters='(20, 30)')
    frozen = dict(heads.model.temp_frozen_params_iter_map)
    assert list(frozen) == ['head/prototypes0', 'head/prototypes1']
    gray = recipe('own_images', data__channels=1)
    assert len(gray.data.mean) == len(gray.data.std) == 1
    sgd = recipe('small_images', optimizer__name='sgd')
    lr, reasons = sgd.optimizer.param_schedulers.lr, dict(sgd.choices)
    assert lr.auto_lr_scaling.base_value == 0.3 and sgd.optimizer.use_larc
    assert 'with sgd' in reasons['config.optimizer.param_schedulers.lr']
    changed = 'optimizer__param_schedulers__lr__schedulers[0]__start_value'
    named = dict(recipe('small_images', **{changed: 0.001}).choices)
    assert 'config.optimizer.param_schedulers.lr' not in named


@pytest.mark.parametrize('name', RECIPES)
@pytest.mark.parametrize(
    ('setting', 'value'),
    [
        ('data.batchsize_per_replica', '0'),
        ('data.limit', '-1'),
        ('data.channels', '0'),
        ('optimizer.num_epochs', '0'),
        ('model.head.num_clusters', '()'),
        ('data.size_crops', '()'),
        ('data.no_setting', '1'),
    ],
)
def test_a_value_that_no_run_can_have_is_named(name, setting, value):
    with pytest.raises(UserError) as error:
        load_config(f'{ROOT}/configs/{name}.py:cpu', [(f'config.{setting}', value)])
    assert f'config.{setting}' in str(error.value) and 'Error' not in str(error.value)


@pytest.mark.parametrize('name', RECIPES)
def test_more_gpus_than_the_images_fill(name):
    config = recipe(name, '64', data__limit=100)
    assert config.data.batchsize_per_replica == 1
    settings.sizes(config, num_images=100, num_devices=64)


def test_reasons_have_the_numbers_of_the_run():
    for count, reason in ((100, 'one for 20 of 100 images'), (700, 'one for 100 of 700 images')):
        reasons = dict(recipe('small_images', data__limit=count).choices)
        assert reasons['config.model.head.num_clusters'].startswith(reason)
    config = recipe('small_images')
    assert 'for 10,000 of them' in dict(config.choices)['config.data.source']
    assert config.data.limit == 0  # which would hide images that are named later


def test_the_command_line_wins_and_later_choices_follow_it():
    config = recipe('own_images', '1', data__limit=100_000, data__batchsize_per_replica=512)
    assert config.data.batchsize_per_replica == 512 and config.loss.queue.queue_length == 0
    named = {name for name, _ in config.choices}
    assert 'config.data.batchsize_per_replica' not in named
    assert 'config.model.head.num_clusters' in named
    assert set(named) <= {name for name, _ in settings.flatten(config)} | {
        'config.optimizer.param_schedulers.lr'
    }
    regnet = recipe('small_images', model__trunk__name='regnet_y_400mf', data__limit=500)
    assert regnet.model.trunk.name == 'regnet_y_400mf'


@pytest.mark.parametrize('name', RECIPES)
def test_gpus_share_what_one_gpu_would_take(name):
    one, eight = (recipe(name, words, data__limit=50_000) for words in '18')
    lr = one.optimizer.param_schedulers.lr
    assert lr == eight.optimizer.param_schedulers.lr
    assert eight.data.batchsize_per_replica <= one.data.batchsize_per_replica


def test_words_after_the_colon_are_devices(tmp_path, monkeypatch):
    assert small_data.read_devices('cpu').count == 0 and small_data.read_devices('4').count == 4
    for words in ('0', '65', '-1', 'gpu', '²', '1.5'):
        with pytest.raises(UserError, match='number of GPUs from 1 to 64, or cpu'):
            small_data.read_devices(words)
    (tmp_path / '0000:01:00.0').mkdir()
    monkeypatch.setattr(small_data, 'GPUS', tmp_path)
    monkeypatch.delenv('JAX_PLATFORMS')
    assert small_data.read_devices('').count == 1
    monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
    assert small_data.read_devices('').count == 0


def write(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f'{i}.png')
    return f'folder:{folder}'


def test_a_survey_finds_count_sides_mean_and_std(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(40, 30), (30, 50), (32, 64)]
    images = [rng.integers(0, 200, (*size, 3), np.uint8) for size in sizes]
    source = write(tmp_path / 'images', images)
    (tmp_path / 'images' / 'broken.png').write_bytes(b'not an image')
    data = settings.default().data
    data.source = source
    found = survey(data)
    assert (found.num_images, found.side, found.sides) == (4, 30, (30, 32))
    pixels = np.stack([image.reshape(-1, 3).mean(0) for image in images]) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(0), atol=1e-3)
    squares = np.mean([((image / 255) ** 2).mean((0, 1)) for image in images], 0)
    np.testing.assert_allclose(found.std, np.sqrt(squares - pixels.mean(0) ** 2), atol=1e-3)
    data.limit = 2
    assert survey(data).num_images == 2
    # Images of one color do not make everything else infinitely loud.
    data.source, data.limit = write(tmp_path / 'flat', [np.full((9, 9, 3), 7, np.uint8)] * 3), 0
    assert min(survey(data).std) == 0.05


def test_images_none_of_which_can_be_read_are_named(tmp_path):
    (tmp_path / 'a.png').write_bytes(b'no')
    data = settings.default().data
    data.source = f'folder:{tmp_path}'
    with pytest.raises(UserError, match='none of 1 images that were tried can be read'):
        survey(data)


@pytest.mark.parametrize('name', RECIPES)
def test_too_few_images_are_one_line(name, tmp_path, capsys):
    images = [np.full((20, 20, 3), i, np.uint8) for i in range(10)]
    flags = [f'--config.data.source={write(tmp_path / "few", images)}', f'--workdir={tmp_path}/run']
    assert main.main([f'--config=configs/{name}.py', *flags]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'has 10 images: this recipe needs at least 64' in error
    assert not (tmp_path / 'run').exists()


def test_the_plan_gives_the_reasons(capsys):
    flags = ['--config.data.source=synthetic:3000x64', '--config.loss.epsilon=0.04']
    assert main.main(['--config=configs/small_images.py:cpu', '--plan', *flags]) == 0
    out = capsys.readouterr().out
    assert 'config.model.head.num_clusters=[30]\n    one for 100 of 3,000 images' in out
    assert 'config.loss.epsilon=0.03' not in out and '--config.loss.epsilon=0.04' in out


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(64, 64), (20, 90)])
def test_a_folder_of_pictures_of_one_class_trains(sizes, tmp_path):
    """RGBA, of one size or of many: the run ends, learns, and says nothing of a collapse."""
    rng = np.random.default_rng(0)
    low, high = sizes
    images = []
    for i in range(120):
        pixels = np.zeros((rng.integers(low, high + 1), rng.integers(low, high + 1), 4), np.uint8)
        pixels[..., 3] = rng.integers(0, 256)
        pixels[: len(pixels) // (1 + i % 3), :, i % 3] = rng.integers(100, 256)
        images.append(pixels)
    workdir, source = tmp_path / 'run', write(tmp_path / 'images' / 'only', images)
    flags = [f'--config.data.source={source}', '--config.optimizer.num_epochs=8']
    done = run(workdir, *flags, config='configs/small_images.py:cpu')
    assert done.returncode == 0, done.stderr
    assert 'collapse' not in done.stdout + done.stderr
    loss = [row['loss_over_ln_k'] for row in rows(workdir)]
    assert loss[-1] < 0.97 * loss[0]
    assert (workdir / 'report.html').is_file()
