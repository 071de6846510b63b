"""What every source must do with a mistake: refuse it in one line."""

import contextlib
import os
import tempfile
from pathlib import Path

import pytest

from swav_jax.data import sources
from swav_jax.errors import UserError


def refusal(spec, **kwargs):
    """The one line that refuses the spec, and names the setting with its value."""
    with pytest.raises(UserError) as caught:
        sources.open_source(spec, **{'channels': 3} | kwargs)
    text = str(caught.value)
    assert '\n' not in text and f'config.data.source={spec!r}' in text, text
    return text


@contextlib.contextmanager
def another_user(tmp_path):
    """Without root's rights, for whom no permission is denied; `tmp_path` can be reached."""
    is_root = os.geteuid() == 0
    if is_root:
        base = Path(tempfile.gettempdir())
        for folder in (tmp_path, *tmp_path.parents):
            if base in folder.parents:
                folder.chmod(0o755)
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
