"""Refusals of a file system, found in exceptions of any kind."""

import errno
import os
import re
from collections.abc import Collection

from swav_jax.errors import printable

NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# The process may not open the file, whatever it holds.
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
# Other errors of a writer.
OF_WRITERS = (
    *NO_ACCESS, errno.EROFS, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOTEMPTY,
)  # fmt: skip


def find(error: BaseException | None, codes: Collection[int]) -> str | None:
    """Return the refusal with one of `codes` in an exception or its causes, or None.

    TensorStore has it in the text of other exceptions.
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
    """Return TensorStore's own code for a file that is missing or cannot be used."""
    found = re.match('NOT_FOUND|PERMISSION_DENIED|DATA_LOSS|FAILED_PRECONDITION', str(error))
    return found and found[0]
