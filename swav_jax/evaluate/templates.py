"""HTML pages from the templates beside this file; base.html has what they share."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import swav_jax
from swav_jax.errors import printable


def render(template: str, **content: Any) -> str:
    """Render a page; all of `content` is shown as text, not read as markup."""
    return _environment.get_template(template).render(content, version=swav_jax.__version__)


def _shown(value: Any) -> Any:
    return (
        value if hasattr(value, '__html__') else printable(value)
    )  # the output of a macro is markup


_environment = Environment(
    loader=PackageLoader('swav_jax.evaluate', '.'),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_shown,
    trim_blocks=True,
    lstrip_blocks=True,
)
