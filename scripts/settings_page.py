"""Write docs/settings.md: every setting with its default, what it may be, and what it means.

    python scripts/settings_page.py --out docs/settings.md

The page has the settings by section, then those of each trunk, as tables. A test compares the file
with what this writes.
"""

import itertools
import sys
from collections.abc import Sequence

from swav_jax import cli
from swav_jax.config import trunks
from swav_jax.config.kinds import Kind
from swav_jax.config.schedules import Schedule
from swav_jax.config.settings import SETTINGS
from swav_jax.errors import UserError

HEAD = '| setting | default | may be | meaning |\n|---|---|---|---|'
# Defaults that are sections.
DEFAULTS = {Schedule: 'warm-up, then a cosine', trunks.Trunk: 'a ResNet-50'}

INTRODUCTION = """# Settings

All settings of a run, by the sections of its config. `--config.SETTING=VALUE` sets one. The
defaults are VISSL's recipe for ResNet-50. `scripts/settings_page.py` writes this page.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for section, rows in itertools.groupby(SETTINGS.items(), key=lambda row: section_of(row[0])):
        parts += [f'## {section}\n', HEAD]
        for path, setting in rows:
            default = DEFAULTS.get(type(setting.kind), f'`{setting.default!r}`')
            parts.append(f'| `{path}` | {default} | {setting.kind.words} | {setting.about} |')
        parts.append('')
    for name in ('resnet', 'regnet'):
        parts += [f'## model.trunk, of the name {name}\n', HEAD]
        for key, field in trunks.fields(name).items():
            kind, about = field.metadata['kind'], field.metadata['about']
            default = f'`{field.default!r}`' if allows(kind, field.default) else 'none'
            parts.append(f'| `model.trunk.{key}` | {default} | {kind.words} | {about} |')
        parts.append('')
    return '\n'.join(parts)


def allows(kind: Kind, value: object) -> bool:
    """Whether a value is of a kind."""
    try:
        kind.check('', value)
    except UserError:
        return False
    return True


def section_of(path: str) -> str:
    """The first name of a path, or a title for settings that have no section."""
    first, dot, _ = path.partition('.')
    return first if dot else 'The run'


def main(argv: Sequence[str]) -> None:
    """Write the page."""
    parser = cli.Parser(__doc__)
    parser.add_argument('--out', type=cli.new_file, required=True, help='file to write')
    parser.parse(argv).out.write_text(page())


if __name__ == '__main__':
    sys.exit(cli.run(main, sys.argv[1:]))
