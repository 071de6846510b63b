"""A headless Chromium to look at a page with, over the DevTools protocol's pipe."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
BINARY = next(filter(None, map(shutil.which, NAMES)), None)
# What a page that is in order does not make the browser report.
COMPLAINTS = ('Log.entryAdded', 'Runtime.consoleAPICalled', 'Runtime.exceptionThrown')


class Browser:
    """One tab. `events` holds everything that it has reported."""

    def __init__(self, read: int, write: int):
        self.pipes = contextlib.ExitStack()
        self._read = self.pipes.enter_context(os.fdopen(read, 'rb'))
        self._write = self.pipes.enter_context(os.fdopen(write, 'wb'))
        self._buffer, self._number = b'', 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        attached = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self._session = attached['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer."""
        self._number += 1
        message = {'id': self._number, 'method': method, 'params': params}
        if self._session:
            message['sessionId'] = self._session
        self._write.write(json.dumps(message).encode() + b'\0')
        self._write.flush()
        while (answer := self._receive()).get('id') != self._number:
            self.events.append(answer)
        assert 'error' not in answer, answer
        return answer['result']

    def open(self, path: Path, width: int, height: int, *, phone: bool = False) -> None:
        """Load a file in a window of a size and wait until all is shown."""
        self.events.clear()
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.call('Page.navigate', url=path.as_uri())
        while not any(event.get('method') == 'Page.loadEventFired' for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """The value of an expression on the page."""
        answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
        return answer['result']['value']

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        answer = self.call('Page.captureScreenshot', captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer['data']))

    def print(self) -> bytes:
        """The page on paper, as a PDF."""
        return base64.b64decode(self.call('Page.printToPDF')['data'])

    def _receive(self) -> dict[str, Any]:
        while b'\0' not in self._buffer:
            part = self._read.read1(65536)
            assert part, 'the browser is gone'
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b'\0')
        return json.loads(message)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that keeps its profile in `folder`; ended at the end."""
    from_us, our_write = os.pipe()
    our_read, to_us = os.pipe()
    # The protocol's places are 3 and 4, which may be taken here, so a shell puts the pipes there.
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (from_us, to_us)]
    process = subprocess.Popen(
        [
            'bash', '-c', f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', 'bash',
            BINARY, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
            '--remote-debugging-pipe', f'--user-data-dir={folder}', '--no-first-run',
        ],
        pass_fds=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for end in (from_us, to_us, *theirs):
        os.close(end)
    try:
        tab = Browser(our_read, our_write)
        with tab.pipes:
            yield tab
    finally:
        process.terminate()
        process.wait(timeout=20)
