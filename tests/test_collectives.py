"""What a step sends over the mesh, read from the program that XLA made for 8 devices."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import make_update, random_crops, small_config, start

OPERATION = re.compile(
    r'= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)'
    r'(-start)?\(.*op_name="(?P<name>[^"]*)"'
)
SIZES = {'f32': 4, 'bf16': 2, 'f16': 2, 'pred': 1, 's32': 4}


def collectives(program):
    """(kind, what for, element types, bytes of the result) of every one."""
    for found in filter(None, map(OPERATION.search, program.splitlines())):
        arrays = re.findall(r'(\w+)\[([\d,]*)\]', found['result'])
        size = sum(SIZES[t] * np.prod([int(n) for n in dims.split(',') if n]) for t, dims in arrays)
        yield found['kind'], purpose(found['name']), {t for t, _ in arrays}, int(size)


def purpose(name):
    """What a collective's place in the code says that it is for."""
    for word in ('average_gradients', 'sinkhorn_codes', 'health'):
        if word in name:
            return word
    if re.search(r'[/(:](\w*bn\w*|downsample_1|norm\d)/', name):
        return 'BatchNorm, backward' if 'transpose' in name else 'BatchNorm, forward'
    return name


def compiled(c, dtype=jnp.float32):
    """The program of an update on 8 devices, and the number of parameters."""
    layout, net, tx, state = start(c, 8, dtype=dtype, queue_batches=1)
    crops = random_crops(c, 0)
    program = make_update(c, layout, net, tx).lower(state, crops, np.ones(16, np.float32))
    return program.compile().as_text(), sum(x.size for x in jax.tree.leaves(state.params))


def config(**changes):
    real = {'model.trunk.depth': 10, 'model.trunk.width_multiplier': 0.125}
    heads = {'model.head.num_clusters': (6, 5)}
    return small_config(**{'optimizer.use_larc': True, **real, **heads, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [{}, {'precision': 'bfloat16'}, {'precision': 'float16', 'model.remat': 'block'}],
    ids=['float32', 'bfloat16', 'float16-remat'],
)
def test_a_step_sends_gradients_once_and_little_else(changes):
    """Half-precision gradients, a metric of its own or recomputed statistics would show here."""
    c = config(**changes)
    program, num_params = compiled(c, jnp.dtype(c.precision))
    found = list(collectives(program))
    assert {kind for kind, *_ in found} == {'all-reduce'}
    assert set().union(*(types for _, _, types, _ in found)) == {'f32'}
    count, sent = Counter(), Counter()
    for _, what, _, size in found:
        count[what] += 1
        sent[what] += size
    layers, resolutions = 20, len(c.data.size_crops)  # of a ResNet-18's trunk
    assert sent['average_gradients'] == pytest.approx(4 * num_params, rel=0.02)
    assert count['sinkhorn_codes'] <= c.loss.num_iters + 1
    assert count['BatchNorm, forward'] <= layers * resolutions + 1  # the head's sees all crops
    assert count['BatchNorm, backward'] <= layers * resolutions + 1
    assert count['health'] <= 1
    assert set(count) <= {
        'average_gradients', 'sinkhorn_codes', 'BatchNorm, forward', 'BatchNorm, backward', 'health'
    }  # fmt: skip


@pytest.mark.slow
def test_a_sliced_state_is_gathered_once_and_gradients_are_scattered():
    c = config(sharding='zero')
    program, num_params = compiled(c)
    sent = Counter()
    for kind, what, _, size in collectives(program):
        sent[kind] += size
        if what == 'average_gradients':
            sent[what] += size
    assert sent['all-gather'] == pytest.approx(4 * num_params, rel=0.05)
    assert sent['reduce-scatter'] == pytest.approx(4 * num_params / 8, rel=0.05)
    # What is reduced and kept whole: BatchNorm's sums, Sinkhorn's, and two norms per array.
    assert sent['all-reduce'] < 0.2 * 4 * num_params
