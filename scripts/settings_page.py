"""Write docs/settings.md: every setting with its default, what it may be, and what it means.

python scripts/settings_page.py > docs/settings.md
"""

import itertools

from swav_jax.config.schedules import Schedule
from swav_jax.config.settings import SETTINGS

INTRODUCTION = """# Settings

All settings of a run, by the sections of its config. `--config.SETTING=VALUE` sets one. The
defaults are VISSL's recipe for ResNet-50. `python scripts/settings_page.py` writes this page.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for section, rows in itertools.groupby(SETTINGS.items(), key=lambda row: section_of(row[0])):
        parts.append(f'## {section}\n')
        parts.append('| setting | default | may be | meaning |\n|---|---|---|---|')
        for path, setting in rows:
            # Of a schedule the default is a section of its own: docs/recipes.md has it.
            is_schedule = isinstance(setting.kind, Schedule)
            default = 'warm-up, then a cosine' if is_schedule else f'`{setting.default!r}`'
            parts.append(f'| `{path}` | {default} | {setting.kind.words} | {setting.about} |')
        parts.append('')
    return '\n'.join(parts)


def section_of(path: str) -> str:
    """The first name of a path, or a title for settings that have no section."""
    first, dot, _ = path.partition('.')
    return first if dot else 'The run'


if __name__ == '__main__':
    print(page(), end='')
