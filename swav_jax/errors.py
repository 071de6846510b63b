"""The exceptions that end a command, each with its exit code, and the lines that they print.

An error that a user can fix is one line with the setting, its value, what is allowed, what to do.
"""

import contextlib
import errno
import os
import sys
from typing import Any

_REMEDIES = {
    errno.EACCES: 'allow it, or name another place',
    errno.EDQUOT: 'make room, then start again',
    errno.EMFILE: 'raise the limit (ulimit -n)',
    errno.ENAMETOOLONG: 'take a shorter name',
    errno.ENOSPC: 'make room, then start again',
    errno.EPERM: 'allow it, or name another place',
    errno.EROFS: 'name another place',
}
LONGEST = 200  # characters of a value in a line


class RunFailedError(Exception):
    """Not a number, or a collapse: `main` prints it without a stack trace and exits with 3."""


class StoppedError(Exception):
    """A signal stopped the run after a checkpoint: `main` exits with 0, or with 4 after Ctrl-C."""

    def __init__(self, step: int, by_user: bool):
        super().__init__(f'stopped after step {step:,}; the same command resumes it')
        self.by_user = by_user


class UserError(Exception):
    """A mistake that a user can fix: `main` prints it without a stack trace and exits with 2."""


class SaidElsewhereError(UserError):
    """A mistake that another process prints; this process ends without output."""


def os_error_line(error: OSError) -> str:
    """Return what the system refused, for which file, as one line: 'PATH: reason'."""
    names = [n for n in (error.filename, error.filename2) if n is not None]
    paths = ' → '.join(printable(n if isinstance(n, int) else os.fsdecode(n)) for n in names)
    reason = error.strerror or str(error) or type(error).__name__
    parts = [paths, printable(' '.join(str(reason).split())), _REMEDIES.get(error.errno)]
    return ': '.join(filter(None, parts))


def refusal(name: str, value: Any, allowed: str) -> UserError:
    """Return the error for a bad value, as `config.seed=-1: must be 0 or more`."""
    return UserError(f'{name}={show(value)}: must be {allowed}')


def show(value: Any) -> str:
    """Return any value as one line of bounded length."""
    try:
        text = ' '.join(repr(value).split())
    except Exception as error:  # an int of thousands of digits, or a class of the user's
        text = f'<{type(value).__name__}: {type(error).__name__}>'
    text = printable(text)
    return text if len(text) <= LONGEST else f'{text[:LONGEST]}…'


def printable(name: object) -> str:
    r"""Return a name on one line, without anything that controls a terminal.

    Control characters, line breaks, bytes that are not text and characters that change the
    direction of writing become escapes such as `\x1b`; letters and signs of all languages stay.
    """
    return ''.join(c if c.isprintable() else _escaped(c) for c in str(name))


def _escaped(c: str) -> str:
    if '\udc80' <= c <= '\udcff':  # how Python reads a byte of a file name that is not text
        return f'\\x{ord(c) - 0xDC00:02x}'
    return c.encode('unicode_escape').decode()


def say(text: str) -> None:
    """Write a line to stderr, from any thread, whatever locks other threads hold."""
    show_cursor = '\x1b[?25h' if sys.stderr.isatty() else ''
    with contextlib.suppress(OSError):  # nobody reads it: no reason to fail
        os.write(2, f'{show_cursor}{text}\n'.encode())
