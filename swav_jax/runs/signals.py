"""Signals that end a run with a checkpoint: a scheduler's SIGTERM and SIGUSR1, and Ctrl-C.

They are blocked in all threads, and one thread waits for them. So a long compilation does not delay
them, and the handler that JAX installs for SIGTERM with several processes does not get them.
"""

import _thread
import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from swav_jax.errors import say

# Requests of a process to all: they travel with the batch, and the largest one counts.
SAVE, STOP, STOP_FOR_USER = 1, 2, 3
CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(BaseException):
    """A signal came inside `Signals.interruptible`."""


class Signals:
    """Records signals inside a `with` of the main thread; enter it before other threads start.

    Attributes:
      request: 0, or the request of the first signal: STOP or STOP_FOR_USER.
    """

    def __init__(self):
        self.request = 0
        self._interruptible = self._closing = False

    def __enter__(self) -> 'Signals':
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
        self._handler = signal.signal(signal.SIGINT, self._interrupt)
        self._thread = threading.Thread(target=self._wait, name='signals', daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        signal.pthread_kill(self._thread.ident, signal.SIGUSR1)
        self._thread.join()
        signal.signal(signal.SIGINT, self._handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal interrupt what is inside, which need not be finished.

        Raises:
          Interrupted: a signal came, now or before.
        """
        self._interruptible = True
        try:
            if self.request:
                raise Interrupted
            yield
        finally:
            self._interruptible = False

    def _interrupt(self, *_: object) -> None:
        if self._interruptible:
            self._interruptible = False
            raise Interrupted

    def _wait(self) -> None:
        while True:
            number = signal.sigwait(CAUGHT)
            if self._closing:
                return
            if not self.request:
                self.request = STOP_FOR_USER if number == signal.SIGINT else STOP
                name = signal.Signals(number).name
                say(f'{name}: saving after this step; Ctrl-C ends the run at once, unsaved')
                if self._interruptible:
                    _thread.interrupt_main()
            elif number == signal.SIGINT:
                say('stopped at once')
                os._exit(128 + signal.SIGINT)
