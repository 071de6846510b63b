"""What `Model.embed` takes for images, and what it refuses."""

import io
import logging
import types

import jax
import numpy as np
import pytest
import torch
from pictures import encode, picture
from PIL import Image
from small_training import build, small_config

from swav_jax.errors import UserError
from swav_jax.evaluate.model import Model


@pytest.fixture(scope='module')
def model():
    c = small_config()
    c.data.canvas_size, c.evaluate.resize, c.evaluate.size, c.evaluate.batch_size = 32, 16, 16, 8
    net = build(c)
    crops = [np.zeros((2, s, s, 3), np.float32) for s in c.data.size_crops]
    variables = jax.jit(lambda: net.init(jax.random.key(0), crops, train=True))()
    return Model(net, variables, c, None, True, None)


COLOUR, OTHER = picture(20, 24), picture(17, 31, seed=1)
GRAY = COLOUR.convert('L')
RGB, LEVELS = np.array(COLOUR), np.array(GRAY)


def forms_of_one_picture(path):
    alpha = np.concatenate([RGB, np.full((20, 24, 1), 7, np.uint8)], -1)
    objects = np.empty(1, object)
    objects[0] = COLOUR
    return {
        'path': str(path),
        'Path': path,
        'bytes': path.read_bytes(),
        'bytearray': bytearray(path.read_bytes()),
        'picture': COLOUR,
        'file that is open': Image.open(path),
        'with alpha': Image.fromarray(alpha),
        'array': RGB,
        'not contiguous': np.asfortranarray(RGB),
        'array with alpha': alpha,
        'batch': RGB[None],
        'batch with alpha': alpha[None],
        'torch': torch.from_numpy(RGB),
        'jax': jax.numpy.asarray(RGB),
        'list of arrays': [RGB],
        'list of pictures': [COLOUR],
        'list of bytes': [path.read_bytes()],
        'tuple': (str(path),),
        'generator': (x for x in [COLOUR]),
        'objects': objects,
        'array of paths': np.array([str(path)]),
    }


def test_one_picture_in_every_form(model, tmp_path):
    path = tmp_path / 'a.png'
    COLOUR.save(path)
    expected = model.extract(f'folder:{tmp_path}').trunk
    for name, images in forms_of_one_picture(path).items():
        found = model.embed(images)
        assert found.readable.tolist() == [True], name
        np.testing.assert_allclose(found.trunk, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_gray_pictures_in_every_form(model):
    expected = model.embed(np.array(COLOUR.convert('L').convert('RGB'))).trunk
    forms = {
        'array': LEVELS,
        'one channel': LEVELS[..., None],
        'batch of one': LEVELS[None],
        'batch of one channel': LEVELS[None, ..., None],
        'picture': GRAY,
        'palette': GRAY.convert('P'),
        'list': [LEVELS],
        '16 bits': Image.fromarray(LEVELS.astype(np.uint16) * 257),
        '0 to 1': Image.fromarray(LEVELS / np.float32(255)),
    }
    for name, images in forms.items():
        found = model.embed(images)
        np.testing.assert_allclose(found.trunk, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    several = model.embed(np.stack([LEVELS, LEVELS[::-1], LEVELS, LEVELS]))
    assert len(several) == 4
    np.testing.assert_allclose(several.trunk[::2], np.tile(expected, (2, 1)), rtol=1e-5, atol=1e-6)


def test_pictures_of_all_forms_and_sizes_in_one_list(model, tmp_path, caplog):
    OTHER.save(tmp_path / 'b.jpg', quality=95)
    wide = picture(30, 90)  # larger than the canvas
    items = [RGB, OTHER, str(tmp_path / 'b.jpg'), encode(COLOUR, 'PNG'), wide, LEVELS, b'no image']
    items += [np.array(wide), tmp_path / 'missing.png', COLOUR]
    with caplog.at_level(logging.WARNING):
        found = model.embed(items)
    assert found.readable.tolist() == [True] * 6 + [False, True, False, True]
    said = '2 of 10 images cannot be read: images[6], '
    assert said in caplog.text and 'missing.png' in caplog.text
    for i, item in enumerate(items):
        if found.readable[i]:
            alone = model.embed(item).trunk[0]
            np.testing.assert_allclose(found.trunk[i], alone, rtol=1e-5, atol=1e-6)
    assert len(np.unique(found.trunk[[0, 1, 4, 5]].round(4), axis=0)) == 4


REFUSED = {
    'none': (None, 'NoneType'),
    'number': (3, 'type int'),
    'nothing': ([], 'no images'),
    'empty array': (np.zeros((0, 8, 8, 3), np.uint8), r'\[0, 8, 8, 3\]'),
    'floats': (RGB / 255, 'float64.*give uint8'),
    'float tensor': (torch.zeros(2, 3, 8, 8), 'float32.*give uint8'),
    'sixteen bits': (LEVELS.astype(np.uint16), 'uint16'),
    'numbers': (LEVELS.astype(int), 'int64'),
    'yes and no': (LEVELS > 9, 'bool'),
    'channels first': (np.zeros((5, 3, 8, 9), np.uint8), 'channels first'),
    'one, channels first': (np.moveaxis(RGB, -1, 0), 'move its channels last'),
    'in a list, channels first': ([np.moveaxis(RGB, -1, 0)], 'channels first'),
    'open file': (io.BytesIO(encode(COLOUR, 'PNG')), 'images is an open file .BytesIO.: give'),
    'open text': (io.StringIO('a.png\nb.png'), 'images is an open file .StringIO'),
    'open file in a list': ([RGB, io.BytesIO(b'')], r'images\[1\] is an open file'),
    'mapping': (types.MappingProxyType({'a.png': 1}), 'type mappingproxy'),
    'one of two channels': (np.zeros((32, 32, 2), np.uint8), r'\[32, 32, 2\]: one image of two'),
    'missing file': ('/no/such.png', 'none of 1 images can be read: /no/such.png'),
    'unreadable': ([b'no', b'image'], r'none of 2 images .*images\[0\], images\[1\]'),
    'two channels': (np.zeros((5, 8, 8, 2), np.uint8), '2 channels.*1, 3 or 4'),
    'vector': (np.zeros(784, np.uint8), r'uint8\[784\]'),
    'five axes': (np.zeros((1, 2, 8, 8, 3), np.uint8), r'\[1, 2, 8, 8, 3\]'),
    'batches in a list': ([RGB[None], RGB[None]], r'images\[0\].*\[1, 20, 24, 3\]'),
    'lists of numbers': (RGB.tolist(), r'images\[0\] is of type list'),
    'none in a list': ([RGB, None], r'images\[1\] is of type NoneType'),
    'numbers in a list': ([1, 2], r'images\[0\] is of type int'),
    'dict': ({'a': RGB}, 'type dict'),
    'set': ({'a.png'}, 'type set'),
    'objects': (np.array([None, 3]), r'images\[0\] is of type NoneType'),
    'source': ('demo:test', r"extract\('demo:test'\)"),
    'source in a list': (['folder:/pictures'], r"extract\('folder:/pictures'\)"),
    'folder': ('/tmp', "extract\\('folder:/tmp'\\)"),
    'tensor with a gradient': (torch.zeros(8, 8, requires_grad=True), 'not an array'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_no_image_is_refused_in_one_line(model, name):
    images, reason = REFUSED[name]
    with pytest.raises(UserError, match=reason) as caught:
        model.embed(images)
    assert '\n' not in str(caught.value)
