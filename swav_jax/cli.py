"""The command line of every command: its flags, its settings, and how it ends.

`--config FILE[:WORDS]` names a file whose `get_config` returns the settings, and
`--config.SETTING=VALUE` changes one of them, in the type that it has. What is wrong with a command
line, a file or a place to write to is one line, and exit code 2.
"""

import argparse
import contextlib
import difflib
import functools
import logging
import math
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from absl import logging as absl_logging
from ml_collections import ConfigDict

from swav_jax.config.file import BOOLEANS, load_config, override
from swav_jax.errors import SaidElsewhereError, UserError, os_error_line
from swav_jax.terminal import printable


class Parser(argparse.ArgumentParser):
    """Flags whose mistakes are a `UserError`.

    Args:
      description: what --help says first.
      changes: whether `--config.SETTING=VALUE` is taken, too.
    """

    def __init__(self, description: str, *, changes: bool = False, **options: Any):
        spec = getattr(sys.modules['__main__'], '__spec__', None)
        super().__init__(
            prog=f'python -m {spec.name}' if spec else None,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self._takes_changes = changes

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The flags; `changes` holds pairs of a setting's name and its text, None without one.

        Raises:
          UserError: a flag is not known, is missing, or has a value that does not fit.
        """
        rest, changes = split_changes(argv) if self._takes_changes else (list(argv), [])
        for word in rest[: rest.index('--') if '--' in rest else None]:
            if word.startswith('--') and word.partition('=')[0] not in self._option_string_actions:
                self._unknown(word)
        found, extra = self.parse_known_args(rest)
        if extra:
            self._unknown(extra[0])
        found.changes = changes
        return found

    def error(self, message: str) -> None:
        """Raise argparse's message as a `UserError`: 'FLAG=VALUE: …', 'FLAG is missing'."""
        for pattern, line in (
            (r'^argument (?:-\w/)?([^:]*): =', r'\1='),
            (r'^argument (?:-\w/)?', ''),
            (r'^the following arguments are required: (.*)', r'\1 is missing: see --help'),
            (r'^one of the arguments (.*) is required', r'\1 is missing: see --help'),
        ):
            message = re.sub(pattern, line, message)
        raise UserError(message)

    def _unknown(self, word: str) -> None:
        if not word.startswith('-'):
            raise UserError(f'{word!r} is not a flag: flags begin with --, as in --help')
        names = [name.lstrip('-') for name in self._option_string_actions]
        near = difflib.get_close_matches(word.lstrip('-').partition('=')[0], names, n=1)
        hint = f'. Did you mean: {near[0]}?' if near else ': see --help'
        raise UserError(f'{word!r} is not known{hint}')


def split_changes(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Take `--config.SETTING=VALUE` and `--config.SETTING VALUE` out of a command line."""
    rest, changes, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.lstrip('-').partition('=')
        if not re.match('--?config[.]', word):
            rest.append(word)
            continue
        if not equals:
            # A number below 0 is a value, too.
            has_value = words and re.match(r'[^-]|$|-[\d.]|-(inf|nan)\b', words[0])
            text = words.pop(0) if has_value else None
        changes.append((name, text))
    return rest, changes


def integer(least: int = 0, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag that is a whole number in these bounds."""

    def parse(text: str) -> int:
        allowed = f'a whole number of {least} or more' + f', to {most}' * (most != 2**31 - 1)
        return _checked(int, text, lambda x: least <= x <= most, allowed)

    return parse


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """The type of a flag that is a finite number in these bounds."""

    def parse(text: str) -> float:
        bounds = [
            f'{word} {x:g}' for word, x in (('from', least), ('to', most)) if abs(x) < math.inf
        ]
        allowed = ' '.join(['a number', *bounds])
        return _checked(float, text, lambda x: math.isfinite(x) and least <= x <= most, allowed)

    return parse


def positive(most: float = math.inf) -> Callable[[str], float]:
    """The type of a flag that is a finite number above 0."""

    def parse(text: str) -> float:
        allowed = 'a number above 0' + f', to {most:g}' * (most < math.inf)
        return _checked(float, text, lambda x: math.isfinite(x) and 0 < x <= most, allowed)

    return parse


def boolean(text: str) -> bool:
    """The type of a flag that may have a value, true or false."""
    return _checked(lambda t: BOOLEANS[t.lower()], text, lambda _: True, 'true or false')


def _checked(
    kind: Callable[[str], Any], text: str, holds: Callable[[Any], bool], allowed: str
) -> Any:
    try:
        value = kind(text)
    except (KeyError, ValueError):
        pass
    else:
        if holds(value):
            return value
    raise argparse.ArgumentTypeError(f'={text}: must be {allowed}')


def path(text: str) -> Path:
    """The type of a flag that names a file or folder: `~` is the user's home."""
    if not text.strip() or '\0' in text:
        raise argparse.ArgumentTypeError(f'={text}: must name a file or folder')
    try:
        found = Path(text).expanduser()
        found.exists()  # fails where the name is too long, or a folder is closed to the user
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f'={text}: no such home folder') from error
    except OSError as error:
        raise argparse.ArgumentTypeError(f'={text}: {error.strerror}') from error
    if found == Path('/'):
        raise argparse.ArgumentTypeError(f'={text}: must name a file or folder in it')
    return found


def new_file(text: str) -> Path:
    """The type of a flag that names a file to write: a regular one, or none yet."""
    if text.endswith(os.sep):
        raise argparse.ArgumentTypeError(
            f'={text}: must name a file, not a folder (no / at the end)'
        )
    return _new(text, Path.is_file, 'file')


def new_folder(text: str) -> Path:
    """The type of a flag that names a folder to write to, which need not be there yet."""
    return _new(text, Path.is_dir, 'folder')


def _new(text: str, is_right: Callable[[Path], bool], kind: str) -> Path:
    found = path(text)
    if found.exists() and not is_right(found):
        raise argparse.ArgumentTypeError(f'={text}: must name a {kind}, which this is not')
    parent = next(p for p in found.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(found if found.exists() else parent, os.W_OK):
        raise argparse.ArgumentTypeError(f'={text}: cannot be written into {parent}')
    return found


def read_config(spec: str | None, changes: Sequence[tuple[str, str | None]]) -> ConfigDict | None:
    """The settings of a --config, changed by `Parser.parse`'s `changes`; None without a file.

    Raises:
      UserError: the file fails, or a setting is not known or does not take its value.
    """
    if spec is None and changes:
        raise UserError(f'--{changes[0][0]} needs a --config that it can change')
    return None if spec is None else override(load_config(spec), changes)


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Call `main` and return the exit code: 2 where `failure` has a line for what it raises.

    A reader of its output that is gone ends a command without a word, with the code that a shell
    gives to that signal; `go_on_without_output` keeps a run from it.
    """
    quiet_libraries()
    with _outputs():
        try:
            try:
                code = main(argv) or 0
            except SystemExit as done:  # argparse's --help
                code = done.code or 0
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except Exception as error:
            line = failure(error)
            if line is None:
                raise
            tell(line)
            return 2


@functools.cache
def quiet_libraries() -> None:
    """Keep what TensorFlow and orbax print on their own out of a command's output.

    A command calls it before TensorFlow is imported, which reads its variables then. It is for the
    whole process, so nothing calls it where swav_jax is a library.
    """
    # TensorFlow's log greets the user with pages of plug-ins and has a line for every damaged file
    # (JAX, where it comes first, sets the level to 1), and oneDNN adds two lines that no level
    # hides.
    if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    # Exceptions say what failed. Of one failed read or write orbax logs warnings and several
    # traces, and the coroutines that it drops print more of them to stderr, at any time later.
    absl_logging.get_absl_logger().addFilter(
        lambda record: 'orbax' not in record.pathname or record.levelno < logging.WARNING
    )
    logging.getLogger('asyncio').addFilter(lambda record: not _is_of_orbax(record))
    never_awaited = r"coroutine '.*(serialize|write|save|commit).*' was never awaited"
    warnings.filterwarnings('ignore', never_awaited, RuntimeWarning)
    hook = sys.unraisablehook

    def all_but_abandoned_coroutines(unraisable: Any) -> None:
        coroutine = repr(getattr(unraisable.object, 'cr_code', None))
        if 'orbax' not in coroutine and str(unraisable.exc_value) != 'Event loop is closed':
            hook(unraisable)

    sys.unraisablehook = all_but_abandoned_coroutines


def _is_of_orbax(record: logging.LogRecord) -> bool:
    """Whether it tells of a coroutine of orbax, or of an exception that came from there."""
    error = record.exc_info and record.exc_info[1]
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return 'orbax' in record.getMessage() or any('orbax' in frame.filename for frame in frames)


def failure(error: Exception) -> str | None:
    """The line for a mistake of the user's or a refusal of the system's; None for a bug.

    It is empty where another process has said it.
    """
    if isinstance(error, UserError):
        return '' if isinstance(error, SaidElsewhereError) else str(error)
    if isinstance(error, OSError):
        return os_error_line(error)
    if isinstance(error, MemoryError):
        return f'the memory does not suffice ({error}): take smaller batches or fewer images'
    if isinstance(error, RuntimeError) and 'home directory' in str(error):  # of Path.expanduser
        return f'a path with ~ cannot be resolved: {error}'
    if 'RESOURCE_EXHAUSTED' in str(error):
        reason = str(error).strip().partition('\n')[0]
        return f'the devices have too little memory ({reason}): lower config.evaluate.batch_size'
    return None


def tell(line: str) -> None:
    """Print an error on one line, in which nothing controls a terminal."""
    if line:
        print(f'error: {printable(" ".join(line.split()))}', file=sys.stderr, flush=True)


class _Output:
    """A stream that may fail: its reader is gone, or its disk is full.

    Args:
      stream: takes the text.
      name: for error messages.
      goes_on: whether a failure leaves the rest unprinted, instead of being raised.
    """

    def __init__(self, stream: TextIO, name: str, goes_on: bool):
        self._stream, self._name, self.goes_on = stream, name, goes_on

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable[..., Any], *arguments: str) -> None:
        try:
            function(*arguments)
        except OSError as error:
            _to_nowhere(self._stream)
            if not self.goes_on:
                raise OSError(error.errno, error.strerror, self._name) from error
            if self._name:
                tell_once = f'{self._name}: {error.strerror}: the run goes on without printing'
                print(tell_once, file=sys.stderr)
                self._name = ''


def go_on_without_output() -> None:
    """From here on a failure of standard output is said on stderr, once, and ends nothing."""
    if isinstance(sys.stdout, _Output):
        sys.stdout.goes_on = True


def _to_nowhere(stream: TextIO) -> None:
    """Let what a stream still holds, and writes at exit, go nowhere."""
    with contextlib.suppress(OSError, ValueError), Path(os.devnull).open('w') as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def _outputs() -> Iterator[None]:
    """Streams that take every letter, and whose failures are seen."""
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open('w') as nowhere:
        out, err = (nowhere if stream is None else stream for stream in before)  # closed ones
        for stream in (out, err):
            if hasattr(stream, 'reconfigure'):
                stream.reconfigure(errors='backslashreplace')
        sys.stdout = _Output(out, 'standard output', goes_on=False)
        sys.stderr = _Output(err, '', goes_on=True)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
