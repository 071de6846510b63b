"""Lines on a terminal: names as text that can be printed anywhere, and a way to stderr."""

import contextlib
import os
import sys


def printable(name: object) -> str:
    r"""A name on one line, in which nothing controls a terminal.

    Control characters, line breaks, bytes that are no text and characters that change the direction
    of writing become escapes such as `\x1b`; letters and signs of all languages stay.
    """
    return ''.join(c if c.isprintable() else _escaped(c) for c in str(name))


def _escaped(c: str) -> str:
    if '\udc80' <= c <= '\udcff':  # how Python reads a byte of a file name that is no text
        return f'\\x{ord(c) - 0xDC00:02x}'
    return c.encode('unicode_escape').decode()


def say(text: str) -> None:
    """Write a line to stderr, from any thread and whatever the others hold."""
    show_cursor = '\x1b[?25h' if sys.stderr.isatty() else ''
    with contextlib.suppress(OSError):  # nobody reads it, and what it tells of happens all the same
        os.write(2, f'{show_cursor}{text}\n'.encode())
