"""Config files, and changes of settings on a command line.

A config file is the user's own Python: its `get_config` returns the settings. If it fails in any
way, that is reported in one line.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import re
import runpy
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax.config import trunks
from swav_jax.errors import UserError, show

LONGEST_FILE = 10_000_000  # bytes
BOOLEANS = dict.fromkeys(('true', 't', 'yes', 'y', '1'), True)
BOOLEANS |= dict.fromkeys(('false', 'f', 'no', 'n', '0'), False)


Changes = Sequence[tuple[str, str | None]]  # names and texts: ('config.loss.epsilon', '0.03')


def load_config(spec: str, changes: Changes = ()) -> ConfigDict:
    """Call the `get_config` of a file; `spec` is FILE or FILE:WORDS.

    A `get_config` with an argument `changes` gets them, so that its choices can depend on them.
    The caller still applies them to the result with `override`.

    Raises:
      UserError: there is no such file, it fails, or it returns something else than the settings.
    """
    file, words = _split_spec(spec)
    try:
        get_config = runpy.run_path(str(file)).get('get_config')
        if not callable(get_config):
            raise UserError('--config: the file has no function get_config that returns settings')
        if 'changes' in _parameters(get_config):
            get_config = functools.partial(get_config, changes=changes)
        config = get_config(*_arguments(get_config, words))
        _check_whole(config, settings.default(), 'config', ())
        config.model.trunk = trunks.adopt(config.model.trunk)
    except UserError:
        raise
    except BaseException as error:  # the file is the user's own Python
        raise UserError(f'--config={spec}: {_where(error, file)}') from error
    return config.lock()


def _split_spec(spec: str) -> tuple[Path, str]:
    """Split FILE[:WORDS]; the name of the file may contain colons."""
    if not spec:
        raise UserError('--config= names no file: see configs/ for some')
    ends = [i for i, c in enumerate(spec) if c == ':'] + [len(spec)]
    try:
        files = [Path(spec[:end]).expanduser() for end in ends]
        for file, end in zip(reversed(files), reversed(ends), strict=True):
            if file.is_file():
                if file.stat().st_size > LONGEST_FILE:
                    raise UserError(f'--config={file} is too long for a file of settings')
                return file, spec[end + 1 :]
    except (RuntimeError, ValueError) as error:  # no such home folder; a null byte
        raise UserError(f'--config={spec}: {error}') from error
    reason = 'it is a folder' if files[0].is_dir() else 'there is no such file'
    raise UserError(f'--config={files[0]}: {reason}; see configs/ for some')


def _arguments(get_config: Callable[..., Any], words: str) -> list[str]:
    """The arguments of `get_config`, which may require words, accept them or take none."""
    takes = [len(given) for given in ((), ('',)) if _binds(get_config, given)]
    if words and 1 not in takes:
        raise UserError(f'--config: {words!r} after the colon: this file takes no words there')
    return [words] if words or takes == [1] else []


def _binds(function: Callable[..., Any], given: tuple[str, ...]) -> bool:
    try:
        inspect.signature(function).bind(*given)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        pass
    return True


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # a builtin without a signature
        return {}


def _check_whole(value: Any, default: Any, name: str, above: tuple[int, ...]) -> None:
    """Refuse settings that are no tree, or whose names are not those of the defaults.

    The names in a trunk and in a schedule of the learning rate are checked later.
    """
    if id(value) in above:
        raise UserError(f'--config: {name} holds itself')
    above = (*above, id(value))
    if isinstance(default, ConfigDict) and not isinstance(value, ConfigDict):
        kind = type(value).__name__
        raise UserError(f'--config: {name} is a {kind}, not a ConfigDict: begin with default()')
    if isinstance(value, ConfigDict):
        free = name.startswith(('config.optimizer.param_schedulers', 'config.model.trunk'))
        known = value if free or not isinstance(default, ConfigDict) else default
        for key in (*known, *value):
            if (key in value) != (key in known):
                lacks = 'is missing' if key in known else 'is not a setting'
                raise UserError(f'--config: {name}.{key} {lacks}: begin with default()')
            inner = default.get(key) if isinstance(default, ConfigDict) else None
            _check_whole(value[key], inner, f'{name}.{key}', above)
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            _check_whole(item, None, f'{name}[{i}]', above)


def _where(error: BaseException, file: Path) -> str:
    """One line on what failed in a config file, and where."""
    if isinstance(error, SyntaxError) and error.lineno:
        text = (error.text or '').strip()[:100]
        return f'{error.filename}, line {error.lineno}: {error.msg}: {text}'
    frames = traceback.extract_tb(error.__traceback__)
    line = next((f', line {f.lineno}' for f in reversed(frames) if f.filename == str(file)), '')
    with contextlib.suppress(Exception):  # in its __str__, too
        text = str(error).partition(' Other fields')[0]
        if text.startswith(("'", '"')):  # a KeyError's quotes
            text = text.strip('\'"')
        return f'{file}{line}: {type(error).__name__}: {" ".join(text.split())[:300]}'
    return f'{file}{line}: {type(error).__name__}'


def override(config: ConfigDict, changes: Changes) -> ConfigDict:
    """Set `config.a.b` or `config.a.b[0]` to the value of a text, in the type of the setting.

    A new name of the trunk counts first, because the other settings of the trunk depend on it.

    Args:
      config: the settings, which are changed in place and returned.
      changes: names and texts, like ('config.loss.epsilon', '0.03'). None sets a boolean to True.

    Raises:
      UserError: a setting is unknown, or does not accept its value.
    """
    names = [text for name, text in changes if name == 'config.model.trunk.name' and text]
    if names and names[-1] != config.model.trunk.name:
        config.model.trunk = trunks.section(names[-1])
    for name, text in changes:
        given = f'--{name}' if text is None else f'--{name}={text[:100]}'
        steps = re.findall(r'\[-?\d{1,9}\]|\.?[^.\[]*', name.removeprefix('config'))[:-1]
        try:
            _changed(config, steps, text)
        except _UnknownError as error:
            near = _nearest(name, list(_names(config, 'config')))
            raise UserError(f'{given}: is not a setting; the nearest one is --{near}') from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = ' '.join(str(error).split()).strip('"\'')
            raise UserError(f'{given}: {reason}') from error
    return config


class _UnknownError(Exception):
    """There is no such setting."""


def _changed(value: Any, steps: Sequence[str], text: str | None) -> Any:
    """Change a value, a section in place; returns the new value."""
    if not steps:
        return _parsed(text, value)
    step, *others = steps
    if step.startswith('[') and isinstance(value, (tuple, list)):
        items, index = list(value), int(step[1:-1])
        if not -len(items) <= index < len(items):
            raise ValueError(f'there are {len(items)} of them, from [0] to [{len(items) - 1}]')
        items[index] = _changed(items[index], others, text)
        return type(value)(items)
    if not isinstance(value, ConfigDict) or step[:1] != '.' or step[1:] not in value:
        raise _UnknownError
    inner = value[step[1:]]
    new = _changed(inner, others, text)
    if new is not inner:
        value[step[1:]] = new
    return value


def _parsed(text: str | None, default: Any) -> Any:
    """The value of a text, in the type of the default."""
    if isinstance(default, ConfigDict):
        raise ValueError(f'is a section: set one of {", ".join(default)} in it')
    if text is None and not isinstance(default, bool):
        raise ValueError('has no value: write one after =')
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text is not None and text.lower() not in BOOLEANS:
            raise ValueError('must be true or false')
        return True if text is None else BOOLEANS[text.lower()]
    try:
        if isinstance(default, (int, float)):
            return type(default)(text)
        value = tuples(ast.literal_eval(text))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError, OverflowError):
        first = default[0] if isinstance(default, tuple) and default else 0
        if isinstance(first, str) and re.fullmatch(r'[(\[]?\w+(,\s*\w+)*,?[)\]]?', text):
            return tuple(re.findall(r'\w+', text))  # words without quotes
        like = '(1, 2) or (1,)' if isinstance(first, int | float) else show(default)
        kind = {int: 'a whole number', float: 'a number'}.get(type(default), f'as {like}')
        raise ValueError(f'must be {kind}') from None
    return (value,) if isinstance(default, tuple) and not isinstance(value, tuple) else value


def tuples(value: Any) -> Any:
    """A value whose lists, at any depth, are tuples."""
    if isinstance(value, dict):
        return {key: tuples(x) for key, x in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, (tuple, list)) else value


def _names(value: Any, name: str) -> Iterator[str]:
    """Yield the names of all settings in a value."""
    if isinstance(value, ConfigDict):
        for key in value:
            yield from _names(value[key], f'{name}.{key}')
        return
    yield name
    for i, item in enumerate(value if isinstance(value, tuple) else ()):
        if isinstance(item, ConfigDict):
            yield from _names(item, f'{name}[{i}]')


def _nearest(name: str, known: Sequence[str]) -> str:
    last = name.rpartition('.')[2]
    same = [n for n in known if n.rpartition('.')[2] == last]  # in another section
    return difflib.get_close_matches(name, same or known, n=1, cutoff=0)[0]
