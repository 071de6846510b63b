"""What every source must do with a mistake: refuse it in one line."""

import pytest

from swav_jax.data import sources
from swav_jax.errors import UserError


def fails(spec, *parts, **kwargs):
    """The spec is refused in one line that holds these parts and the setting with its value."""
    with pytest.raises(UserError) as caught:
        sources.open_source(spec, **{'channels': 3} | kwargs)
    text = str(caught.value)
    assert '\n' not in text and f'config.data.source={spec!r}' in text, text
    for part in parts:
        assert str(part) in text, text
