"""Parts of a command line: a parser, types of flags, exit codes and output streams.

`--config FILE[:WORDS]` names a file whose `get_config` returns the settings, and
`--config.SETTING=VALUE` changes one of them, in the type that it has. A mistake in a command line
or a file, or a place that cannot be written to, is reported in one line, with exit code 2.
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

from swav_jax import config as settings
from swav_jax.config.file import BOOLEANS, load_config, override
from swav_jax.errors import SaidElsewhereError, UserError, os_error_line, printable


class Parser(argparse.ArgumentParser):
    """Flags whose mistakes are a `UserError`; `description` is the first part of --help."""

    def __init__(self, description: str):
        spec = getattr(sys.modules['__main__'], '__spec__', None)
        super().__init__(
            prog=f'python -m {spec.name}' if spec else None,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._takes_changes = False

    def accept_changes(self) -> None:
        """Accept `--config.SETTING=VALUE`, too."""
        self._takes_changes = True
        self.epilog = (
            '--config.SETTING=VALUE changes a setting, for example --config.evaluate.size=160.\n'
            'With --config FILE, this page lists all settings.'
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the flags; `changes` holds pairs of a setting's name and its text, or None.

        Raises:
          UserError: a flag is unknown or missing, or has a value that is not allowed.
        """
        rest, changes = split_changes(argv) if self._takes_changes else (list(argv), [])
        flags = rest[: rest.index('--') if '--' in rest else None]
        for word in flags:
            if word.startswith('--') and word.partition('=')[0] not in self._option_string_actions:
                self._unknown(word)
        if {'-h', '--help'} & set(flags):
            self._help(rest, changes)
        found, extra = self.parse_known_intermixed_args(rest)
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
            raise UserError(f'{word!r} is not a flag: flags begin with --, see --help')
        names = [name.lstrip('-') for name in self._option_string_actions]
        near = difflib.get_close_matches(word.lstrip('-').partition('=')[0], names, n=1)
        hint = f'. Did you mean: {near[0]}?' if near else ': see --help'
        raise UserError(f'{word!r} is not known{hint}')

    def _help(self, words: Sequence[str], changes: Sequence[tuple[str, str | None]]) -> None:
        """Print the page and, with a --config, every setting; then exit."""
        finder = Parser('')
        finder.add_argument('--config')
        spec = finder.parse_known_args([w for w in words if w not in ('-h', '--help')])[0].config
        known = spec is not None and '--config' in self._option_string_actions
        config = read_config(spec, changes) if known else ConfigDict()
        print(self.format_help(), end='')  # argparse's print_help ignores a failing output
        for name, value in settings.flatten(config):
            line = f'  --{name}={settings.to_dict(value)}'
            about = settings.about(name, config)
            print(f'{line:<50}  # {about}' if about else line)
        self.exit()


def split_changes(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Separate `--config.SETTING=VALUE` and `--config.SETTING VALUE` from the other words."""
    rest, changes, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.lstrip('-').partition('=')
        if not re.match('--?config[.]', word):
            rest.append(word)
            continue
        if not equals:
            # A negative number is a value, not a flag.
            has_value = words and re.match(r'[^-]|$|-[\d.]|-(inf|nan)\b', words[0])
            text = words.pop(0) if has_value else None
        changes.append((name, text))
    return rest, changes


def integer(least: int = 0, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag: a whole number from `least` to `most`."""
    allowed = f'a whole number of {least} or more' + f', to {most}' * (most != 2**31 - 1)
    return _checked(int, lambda x: least <= x <= most, allowed)


def number(least: float, most: float) -> Callable[[str], float]:
    """The type of a flag: a number from `least` to `most`."""
    return _checked(float, lambda x: least <= x <= most, f'a number from {least:g} to {most:g}')


def positive(most: float = math.inf) -> Callable[[str], float]:
    """The type of a flag: a finite number above 0, up to `most`."""
    allowed = 'a number above 0' + f', to {most:g}' * (most < math.inf)
    return _checked(float, lambda x: 0 < x < math.inf and x <= most, allowed)


def _checked(
    kind: Callable[[str], Any], holds: Callable[[Any], bool], allowed: str
) -> Callable[[str], Any]:
    """A type of flags: `kind` of a text, if it `holds`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except (KeyError, ValueError):
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f'={text}: must be {allowed}')
        return value

    return parse


def _bytes(text: str) -> float:
    found = re.fullmatch(r'([\d.]+) ?(MB|MiB|GB|GiB)', text)
    if not found:
        raise ValueError
    return float(found[1]) * {'MB': 1e6, 'MiB': 2**20, 'GB': 1e9, 'GiB': 2**30}[found[2]]


# The type of a flag: bytes.
size = _checked(
    _bytes,
    lambda x: 1e6 <= x <= 1e15,
    'a size in MB, MiB, GB or GiB, from 1MB to 1000000GB, as 80GB',
)
boolean = _checked(lambda text: BOOLEANS[text.lower()], lambda _: True, 'true or false')


def path(text: str) -> Path:
    """The type of a flag: a file or folder; `~` is the user's home."""
    if not text.strip() or '\0' in text:
        raise argparse.ArgumentTypeError(f'={text}: must name a file or folder')
    try:
        found = Path(text).expanduser()
        found.exists()  # fails if the name is too long or a folder may not be read
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f'={text}: no such home folder') from error
    except OSError as error:
        raise argparse.ArgumentTypeError(f'={text}: {error.strerror}') from error
    if found == Path('/'):
        raise argparse.ArgumentTypeError(f'={text}: must name a file or folder in it')
    return found


def new_file(text: str) -> Path:
    """The type of a flag: a file to write, a regular one or a new one."""
    if text.endswith(os.sep):
        raise argparse.ArgumentTypeError(
            f'={text}: must name a file, not a folder (no / at the end)'
        )
    return _new(text, Path.is_file, 'file')


def new_folder(text: str) -> Path:
    """The type of a flag: a folder to write to, which may be a new one."""
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
    """The settings in a config file with the changes of `Parser.parse`; None without a file.

    Raises:
      UserError: the file fails, or a setting is unknown or does not accept its value.
    """
    if spec is None and changes:
        raise UserError(f'--{changes[0][0]} needs a --config that it can change')
    return None if spec is None else override(load_config(spec, changes), changes)


def command(
    page: str,
    parse: Callable[[Parser, Sequence[str]], argparse.Namespace],
    work: Callable[[argparse.Namespace], int | None],
) -> Callable[[Sequence[str]], int]:
    """The `main(argv)` of a command, which returns its exit code.

    Args:
      page: what --help prints above the flags.
      parse: one of `cli.flags`.
      work: what the command does with its flags.
    """
    return lambda argv: run(lambda argv: work(parse(Parser(page), argv)), argv)


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Call `main` and return the exit code: 2 if `failure` has a line for what it raises.

    If the reader of the output is gone, a command ends silently with a shell's code for SIGPIPE;
    `go_on_without_output` makes it continue instead.
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
    """Silence the logs of TensorFlow and orbax in the whole process; for commands only.

    TensorFlow reads these variables when it is imported, so this has to be called before.
    """
    # TensorFlow logs pages on its plug-ins and a line per damaged file (JAX, if it is imported
    # first, sets the level to 1), and oneDNN two lines at every level.
    if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
        os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
    os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
    # Exceptions report what failed. For one failed read or write orbax also logs warnings and
    # several traces, and the coroutines that it drops print more to stderr at any time later.
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
    """Whether a record is about a coroutine of orbax, or an exception raised there."""
    error = record.exc_info and record.exc_info[1]
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return 'orbax' in record.getMessage() or any('orbax' in frame.filename for frame in frames)


def failure(error: Exception) -> str | None:
    """One line for an error that the user can fix or the system reports; None for a bug.

    It is empty if another process has reported it.
    """
    if isinstance(error, UserError):
        return '' if isinstance(error, SaidElsewhereError) else str(error)
    if isinstance(error, OSError):
        return os_error_line(error)
    if isinstance(error, MemoryError):
        return f'not enough memory ({error}): use smaller batches or fewer images'
    if isinstance(error, RuntimeError) and 'home directory' in str(error):  # of Path.expanduser
        return f'a path with ~ cannot be resolved: {error}'
    if 'RESOURCE_EXHAUSTED' in str(error):
        reason = first_line(error)
        return f'the devices have too little memory ({reason}): lower config.evaluate.batch_size'
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition('\n')[0]


def tell(line: str) -> None:
    """Print an error on one line, without control characters; nothing if it is empty."""
    if line:
        print(f'error: {printable(" ".join(line.split()))}', file=sys.stderr, flush=True)


class _Output:
    """A stream whose reader may be gone, or whose disk full.

    After a failure it drops the rest of the text if it `goes_on`; else it raises the failure.
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
                line = f'{self._name}: {error.strerror}: the run continues without printing'
                print(line, file=sys.stderr)
                self._name = ''


def go_on_without_output() -> None:
    """From now on report a failure of standard output on stderr, once, and continue."""
    if isinstance(sys.stdout, _Output):
        sys.stdout.goes_on = True


def _to_nowhere(stream: TextIO) -> None:
    """Discard what a stream still holds and would write at exit."""
    with contextlib.suppress(OSError, ValueError), Path(os.devnull).open('w') as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextlib.contextmanager
def _outputs() -> Iterator[None]:
    """Make stdout and stderr accept every character, and notice when they fail."""
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
