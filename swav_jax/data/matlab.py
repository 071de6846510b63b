"""Arrays of numbers in MATLAB's files of version 5, read within a bound.

The format is in MathWorks' "MAT-File Format": a header of 128 bytes, then elements of a type, a
size and data, each padded to 8 bytes. (scipy's reader ends the process on some damaged files, with
a segmentation fault or a bus error.)
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np

MATRIX, COMPRESSED = 14, 15
# Types of numbers in the file, and of arrays.
NUMBERS = {1: 'i1', 2: 'u1', 3: 'i2', 4: 'u2', 5: 'i4', 6: 'u4', 7: 'f4', 9: 'f8', 12: 'i8',
           13: 'u8'}  # fmt: skip
CLASSES = {6: 'f8', 7: 'f4', 8: 'i1', 9: 'u1', 10: 'i2', 11: 'u2', 12: 'i4', 13: 'u4', 14: 'i8',
           15: 'u8'}  # fmt: skip


def load_arrays(data: bytes, max_bytes: int) -> dict[str, np.ndarray]:
    """The real arrays of a file by name; cells, structures and others are skipped.

    Args:
      data: the file.
      max_bytes: the largest size of an array after decompression.

    Raises:
      ValueError: the file is damaged, or an array is larger.
    """
    order = {b'IM': '<', b'MI': '>'}.get(data[126:128])
    if order is None or len(data) < 136:
        raise ValueError('no MATLAB file of version 5')
    arrays = {}
    for kind, content in _elements(memoryview(data)[128:], order):
        if kind == COMPRESSED:
            kind, content = _decompress(content, order, max_bytes)
        if kind == MATRIX:
            arrays |= _read_matrix(content, order)
    return arrays


def _decompress(packed: memoryview, order: str, max_bytes: int) -> tuple[int, memoryview]:
    """(type, data) of a compressed element, in memory of the size that it states."""
    stream = zlib.decompressobj()
    try:
        kind, count = struct.unpack(f'{order}II', stream.decompress(packed, 8))
        if count > max_bytes + 4096:
            raise ValueError(f'an array of more than {max_bytes:,} bytes')
        content = stream.decompress(stream.unconsumed_tail, count + 1)
    except (zlib.error, struct.error) as error:
        raise ValueError(f'an array that cannot be decompressed ({error})') from error
    if len(content) != count or not stream.eof:
        raise ValueError('an array that is shorter or longer than stated')
    return kind, memoryview(content)


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, data) of one element after another."""
    at = 0
    while at < len(data):
        if at + 8 > len(data):
            raise ValueError('cut short')
        kind, count = struct.unpack_from(f'{order}II', data, at)
        if kind >> 16:  # a small element: its size in the upper half, its data in the same 8 bytes
            kind, count, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            start = at + 8
            end = start + count if kind == COMPRESSED else start + (count + 7) // 8 * 8
        if start + count > min(end, len(data)):
            raise ValueError('cut short')
        yield kind, data[start : start + count]
        at = end


def _read_matrix(data: memoryview, order: str) -> dict[str, np.ndarray]:
    """{name: array} of a matrix element; {} if it is not an array of real numbers."""
    parts = _elements(data, order)
    try:
        (_, flags), (_, shape), (_, name), (kind, values) = (next(parts) for _ in range(4))
    except (RuntimeError, StopIteration) as error:
        raise ValueError('an array without its four parts') from error
    if len(flags) < 8:
        raise ValueError('an array without flags')
    (flags,) = struct.unpack_from(f'{order}I', flags)
    if flags & 0xFF not in CLASSES or flags & 0x800 or kind not in NUMBERS:  # complex, or no array
        return {}
    shape = np.frombuffer(shape, f'{order}i4').tolist()
    array = np.frombuffer(values, np.dtype(NUMBERS[kind]).newbyteorder(order))
    if not shape or min(shape) < 0:
        raise ValueError(f'an array of the shape {shape}')
    array = array.reshape(shape, order='F').astype(CLASSES[flags & 0xFF], copy=False)
    return {bytes(name).decode('latin1'): array}
