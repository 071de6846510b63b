"""Lines on a terminal: names as printable text, and output to stderr from any thread."""

import contextlib
import os
import sys


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
