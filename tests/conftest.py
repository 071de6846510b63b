"""Tests run on 8 virtual CPU devices, with jaxtyping's shapes checked as functions are called."""

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from swav_jax.xla_flags import CPU_FLAGS

# Those of a run, too: XLA's default schedule for CPUs writes to freed memory once in a while, in a
# loop over micro-batches on several devices.
os.environ['XLA_FLAGS'] = ' '.join(
    (os.environ.get('XLA_FLAGS', ''), *CPU_FLAGS, '--xla_force_host_platform_device_count=8')
)
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'

import pytest
import torchvision  # noqa: F401 (first: it crashes the process when TensorFlow came before it)
from jaxtyping import install_import_hook

install_import_hook(
    [
        'swav_jax.methods.queue',
        'swav_jax.methods.sinkhorn',
        'swav_jax.methods.swav',
        'swav_jax.optim',
        'swav_jax.augment',
    ],
    'beartype.beartype',
)


def pytest_configure(config):
    """One folder of compiled programs for the processes that all the workers' tests start."""
    if 'COMPILED_BY_TESTS' not in os.environ:
        folder = tempfile.TemporaryDirectory()
        os.environ['COMPILED_BY_TESTS'] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.fixture(scope='session', autouse=True)
def quiet_libraries():
    """As every command does: what orbax drops after damage would fail a later test."""
    from swav_jax import cli

    cli.quiet_libraries()


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """`configs/` is found wherever pytest began and wherever the test before went."""
    monkeypatch.chdir(Path(__file__).parents[1])


@pytest.fixture(scope='module')
def chromium():
    """A browser, without which the test is skipped."""
    from playwright.sync_api import sync_playwright

    names = ('chromium', 'chromium-browser', 'google-chrome')
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip('needs Chromium')
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=['--no-sandbox'])
