"""Events for TensorBoard, written without a thread.

The thread of tensorboardX's own writer ends when the disk is full, and the next event hangs.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

_SECONDS_BETWEEN_FLUSHES = 10


class TensorBoard:
    """A file of events in a folder, beside those of earlier starts.

    Args:
      folder: made if it is missing.
      first_step: TensorBoard drops events of this and later steps in earlier files; None: none.

    Raises:
      OSError: the file cannot be written; from every method except `close`.
    """

    def __init__(self, folder: Path, first_step: int | None = None):
        folder.mkdir(exist_ok=True)
        self.path = folder / (
            f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'
        )
        self._file = RecordWriter(str(self.path))
        self._write(file_version='brain.Event:2')
        if first_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=first_step, session_log=start)
        self.flush()

    def scalar(self, name: str, value: float, step: int) -> None:
        """Write a number of a step."""
        self._write(step=step, summary=summary.scalar(name, value))
        if time.monotonic() - self._flushed_at > _SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Write an image (height, width, 3) of uint8."""
        self._write(step=step, summary=summary.image(name, image, dataformats='HWC'))

    def flush(self) -> None:
        """Put all events on disk."""
        with self._named():
            self._file.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush if that is possible, and close."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, **event: object) -> None:
        with self._named():
            self._file.write(event_pb2.Event(wall_time=time.time(), **event).SerializeToString())

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Add the file's name to errors of a full disk."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise
