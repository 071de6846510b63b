"""What every source must do with a mistake: refuse it in one line."""

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
