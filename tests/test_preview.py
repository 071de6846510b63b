"""The contact sheet: what it shows is what the network gets."""

import os

import numpy as np
from PIL import Image

from swav_jax import commands
from swav_jax import config as settings
from swav_jax.commands import preview


def demo_config(**data):
    config = settings.default()
    config.data.source = 'demo'
    config.data.update(channels=1, mean=(0.286,), std=(0.353,), canvas_size=28, limit=8)
    config.data.update(num_crops=(1, 2), size_crops=(28, 16), **data)
    config.data.crop_scales = ((0.4, 1.0), (0.2, 0.4))
    return config


def test_a_sheet_is_written(tmp_path):
    preview.draw(demo_config(), tmp_path / 'sheet.png', images=3)
    with Image.open(tmp_path / 'sheet.png') as image:
        assert image.format == 'PNG' and image.width > image.height > 300
        assert len(set(np.asarray(image.convert('L')).ravel())) > 50


def test_a_sheet_shows_boxes_crops_and_unreadable_images():
    config = demo_config()
    source = preview.sources.open_source('demo', limit=2, channels=1)
    batch = {
        'image': source.images[:2],
        'size': np.array([[28, 28], [20, 14]]),
        'boxes': np.array([[[0, 1, 10, 11], [2, 3, 4, 5], [6, 7, 8, 9]]] * 2, np.float32),
        'weight': np.array([1, 0], np.float32),
        'index': np.array([0, 1]),
    }
    crops = [np.zeros((2, 28, 28, 1)), np.zeros((2, 16, 16, 1)), np.ones((2, 16, 16, 1))]
    figure = preview.contact_sheet(source, batch, crops, ['a', 'b', 'c'], config.data)
    axes = np.array(figure.axes).reshape(2, 4)
    box = axes[0, 0].patches[1]
    assert (box.get_y(), box.get_x(), box.get_height(), box.get_width()) == (1.5, 2.5, 4, 5)
    assert axes[1, 0].images[0].get_array().shape == (20, 14, 3)
    assert axes[1, 0].get_xlabel().endswith('unreadable')
    np.testing.assert_allclose(axes[0, 2].images[0].get_array(), 0.286)
    np.testing.assert_allclose(axes[0, 3].images[0].get_array(), 0.639)


def test_a_sheet_shows_names_that_are_no_mathematics_and_not_of_its_font(tmp_path):
    """matplotlib reads `$` as the begin of a formula, and warns of letters that its font lacks."""
    for name in ('$\\frac{1$.png', '_x^{$y$.png', '日本語.png', os.fsdecode(b'\xff.png')):
        Image.new('RGB', (40, 40)).save(tmp_path / name)
    config = demo_config()
    config.data.update(source=f'folder:{tmp_path}', channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    preview.draw(config, tmp_path / 'new' / 'sheet.jpg', images=4)
    assert (tmp_path / 'new' / 'sheet.jpg').is_file()


def test_mistakes_are_one_line(tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text('from swav_jax import config\nget_config = lambda: config.default()\n')
    for arguments, part in (
        ([], '--config is missing'),
        (['--config=/no/such.py'], '/no/such.py'),
        ([f'--config={config}', '--config.data.source=folder:/no/such'], '/no/such'),
        ([f'--config={config}', '--config.data.sauce=demo'], 'config.data.sauce'),
    ):
        assert commands.main(['preview', *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith('error: ') and error.count('\n') == 1 and part in error
