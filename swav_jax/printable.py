"""Names of files and classes as text that can be printed and written anywhere."""

import contextlib


def printable(name: object) -> str:
    r"""A name on one line, in which nothing controls a terminal.

    Control characters, line breaks, bytes that are no text and characters that change the direction
    of writing become escapes such as `\x1b`; letters and signs of all languages stay.
    """
    text = str(name)
    with contextlib.suppress(UnicodeEncodeError):  # surrogates that are no bytes: escaped below
        text = text.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
