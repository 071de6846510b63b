"""Names of files and classes as text that can be printed and written anywhere."""


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
