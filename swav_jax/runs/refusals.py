"""What a file system refuses, found in exceptions of any kind."""

import errno
import os
import re
from collections.abc import Collection

from swav_jax.terminal import printable

NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# What keeps a process from a file, whatever the file holds.
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
# What else a file system answers to a writer.
OF_WRITERS = (
    *NO_ACCESS, errno.EROFS, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOTEMPTY,
)  # fmt: skip


def find(error: BaseException | None, codes: Collection[int]) -> str | None:
    """The file system's refusal that an exception, or what caused it, tells of; None without one.

    TensorStore tells it in the text of other exceptions.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            where = f'{printable(os.fsdecode(error.filename))}: ' if error.filename else ''
            return where + os.strerror(error.errno)
        for code in codes:
            if os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


def status(error: BaseException) -> str | None:
    """TensorStore's own word for a file that is not there or cannot be used."""
    found = re.match('NOT_FOUND|PERMISSION_DENIED|DATA_LOSS|FAILED_PRECONDITION', str(error))
    return found and found[0]
