"""What the loop fetches from the devices: three numbers a step, and nothing else."""

import jax
import pytest
from processes import TINY

from swav_jax import main, training


@pytest.fixture
def fetched(monkeypatch):
    """Shapes and dtypes of the arrays that come to the host, one entry each time."""
    array = type(jax.numpy.zeros(()))
    original, seen = array._value, []

    def value(self):
        seen.append((self.shape, str(self.dtype)))
        return original.fget(self)

    monkeypatch.setattr(array, '_value', property(value))
    return seen


@pytest.mark.slow
def test_a_step_more_is_three_numbers_more(fetched, tmp_path):
    """Of two runs that start, log and end alike, the longer one fetches the news of its steps."""
    counts = []
    for steps in (12, 22):
        flags = (
            f'--config.train.max_steps={steps}',
            '--config.optimizer.num_epochs=100',
            '--config.train.log_every_steps=100',
            '--config.checkpoint.every_epochs=0',
        )
        values = main.parse([f'--config={TINY}', *flags])
        fetched.clear()
        training.run(values.config, tmp_path / str(steps))
        counts.append(list(fetched))
    news = ((3,), 'int32')
    assert [entry.count(news) for entry in counts] == [12, 22]
    others = [sorted(entry for entry in found if entry != news) for found in counts]
    assert others[0] == others[1]
