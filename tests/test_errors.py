"""What the operating system says, as one line."""

import errno
import os
import shutil

import pytest

from swav_jax.errors import os_error_line


def raised(function, *args):
    with pytest.raises(OSError) as caught:
        function(*args)
    return caught.value


def test_a_refusal_of_the_system_is_one_line_with_its_path(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), b'/full/\xff\x1b[2J')
    for error, expected in (
        (raised(open, tmp_path / 'none'), f'{tmp_path}/none: No such file or directory'),
        (raised(open, b'none\n\xff'), r'none\n\xff: No such file or directory'),
        (raised(open, tmp_path), f'{tmp_path}: Is a directory'),
        (raised(os.mkdir, 'x' * 300), f'{"x" * 300}: File name too long: take a shorter name'),
        (raised(os.rename, 'a', 'b'), 'a → b: No such file or directory'),
        (OSError(errno.EBADF, 'Bad file descriptor', 999), '999: Bad file descriptor'),
        (raised(os.listdir, 999), 'Bad file descriptor'),
        (raised(shutil.copytree, tmp_path / 'none', 'b'), f'{tmp_path}/none: No such'),
        (full, r'/full/\xff\x1b[2J: No space left on device: make room, then start again'),
        (OSError('two\n lines'), 'two lines'),
        (OSError(), 'OSError'),
        (ConnectionResetError(), 'ConnectionResetError'),
    ):
        assert os_error_line(error).startswith(expected), os_error_line(error)
