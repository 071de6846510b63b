"""Pictures and image files that the tests of the input make."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(height, width, seed=0, mode='RGB'):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC).convert(mode)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_all(root, files):
    for name, content in files.items():
        (root / name).write_bytes(content)


def png(width, height, bits=1, color=0, chunks=b''):
    """A sound, black PNG."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', check)

    pack = zlib.compressobj(1)
    channels = {0: 1, 2: 3, 6: 4}[color]
    row = bytes(1 + (width * bits * channels + 7) // 8)
    some = row * max(1, 2**20 // len(row))
    left, parts = height * len(row), []
    while left:
        parts.append(pack.compress(some[:left]))
        left -= min(left, len(some))
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, color, 0, 0, 0))
    pixels = chunk(b'IDAT', b''.join(parts) + pack.flush())
    return b'\x89PNG\r\n\x1a\n' + header + chunks + pixels + chunk(b'IEND', b'')
