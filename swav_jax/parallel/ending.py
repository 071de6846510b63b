"""How one of several processes ends: it tells the others why, and does not wait for lost ones.

A process that fails leaves its reason with JAX's coordination service. In each process a thread
waits for such a reason, because the main thread may be stuck in a collective operation. When a
process is killed or stands still, the coordination service aborts the others after
`HEARTBEAT_TIMEOUT`, in C++; the abort is caught here to print what it means.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from jax._src import distributed as jax_distributed

from swav_jax.errors import printable, say

HEARTBEAT_TIMEOUT = 60  # seconds after which a silent process counts as dead
_NOTICE = 5  # seconds for which the main thread may find out by itself what another process tells
_LONGEST_END = 90  # seconds that a process which fails by itself may take to finish a save
_MEET = 30  # seconds for which the processes wait for each other before they exit
_TICK = 1  # seconds between two looks at the clock
_KEY = 'swav_jax/failure'

_AGAIN = 'start all of them again, the run resumes from its last checkpoint'

_failing = threading.Event()  # the main thread is about to end this process
_leaving = threading.Event()
_code = 0  # the exit code of a process that is leaving
_exit = threading.Lock()  # held for good by the thread that ends this process
_seen_at = time.monotonic()  # of the last look at the clock
_stood_still = 0.0  # seconds, the longest time between two looks
_told = ''  # why another process has ended
_watch: threading.Thread | None = None


def watch_others() -> None:
    """End this process when another one ends, from now on; call it after all have joined."""
    global _watch
    _watch = threading.Thread(target=_wait_for_failure, name='others', daemon=True)
    _watch.start()


@contextlib.contextmanager
def own_failure() -> Iterator[None]:
    """Let an exception inside end this process, with time to finish a save."""
    _failing.clear()
    try:
        yield
    except BaseException:
        _failing.set()
        raise


def leave(code: int, reason: str) -> None:
    """Disconnect this process; with a code other than 0 end it, and tell the others why.

    At a regular exit JAX would wait minutes for the other processes, which may wait for this one.

    Args:
      code: the exit code.
      reason: what the others print if the code is not 0.
    """
    state = jax_distributed.global_state
    if code:
        _failing.set()
        if state.client is not None:
            with contextlib.suppress(Exception):  # another one was first, or the service is gone
                mine = {'process': state.process_id, 'code': code, 'reason': reason}
                state.client.key_value_set(_KEY, json.dumps(mine))
        _meet_and_exit(code)
    _leaving.set()
    jax.distributed.shutdown()
    if _watch is not None:
        _watch.join(5 * _TICK)
    _on_abort(None)


def end(code: int, line: str) -> NoReturn:
    """End this process at once, with an error line unless it is empty."""
    if not _exit.acquire(blocking=False):
        threading.Event().wait()  # another thread is about to end it
    if line:
        say(f'error: {line}')
    if threading.current_thread() is threading.main_thread():  # which may hold them, and be stuck
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(code)


def catch_aborts() -> None:
    """Print a line when JAX aborts this process; call it before the processes join."""
    _on_abort(_aborted)


def _meet_and_exit(code: int, line: str = '') -> NoReturn:
    """Exit together: process 0 has the coordination service, without which the others abort."""
    global _code
    if line:
        say(f'error: {line}')
    _code = code
    _leaving.set()
    client = jax_distributed.global_state.client
    if client is not None:
        with contextlib.suppress(Exception):
            client.wait_at_barrier('swav_jax/leaving', 1000 * _MEET)
    end(code, '')


def _wait_for_failure() -> None:
    """The thread that ends this process when another one reports that it failed."""
    global _told
    client = jax_distributed.global_state.client
    failure = None
    while failure is None:
        try:
            failure = json.loads(client.blocking_key_value_get(_KEY, 1000 * _TICK))
        except jax.errors.JaxRuntimeError as error:
            _look_at_clock()
            if _leaving.is_set():
                return
            if 'DEADLINE_EXCEEDED' not in str(error):
                if _leaving.wait(_NOTICE):  # the main thread may find out why
                    return
                end(1, _about_others())
    _told = f'process {failure["process"]} has ended ({printable(failure["reason"])}): {_AGAIN}'
    if _leaving.wait(_NOTICE) or (_failing.is_set() and _leaving.wait(_LONGEST_END)):
        return
    _meet_and_exit(failure['code'], _told)


def _look_at_clock() -> None:
    global _seen_at, _stood_still
    now = time.monotonic()
    _stood_still, _seen_at = max(_stood_still, now - _seen_at), now


def _about_others() -> str:
    _look_at_clock()
    if _told:
        return _told
    if _stood_still > HEARTBEAT_TIMEOUT / 2:
        return (
            f'this process stood still for {_stood_still:.0f} seconds, and the others have ended '
            f'without it: {_AGAIN}'
        )
    return (
        'another process has ended without a message, or did not answer for '
        f'{HEARTBEAT_TIMEOUT} seconds: {_AGAIN}'
    )


# A signal handler of Python's own would run after the abort; this one runs in the thread in which
# the abort happens.
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    if _leaving.is_set():
        end(_code, '')  # process 0 was faster: this thread would have brought the barrier's answer
    end(1, _about_others())


def _on_abort(handler: Callable | None) -> None:
    """Install a C function as the handler of SIGABRT; None leaves it to the system again."""
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    install(signal.SIGABRT, handler and ctypes.cast(handler, ctypes.c_void_p))
