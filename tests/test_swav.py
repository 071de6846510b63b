"""The loss against VISSL's, on one device and on four, and what must hold for any scores."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from swav_jax.methods import swav
from swav_jax.parallel.mesh import AXES, BATCH, make_mesh

GOLDEN = np.load(Path(__file__).parent / 'golden' / 'swav_loss.npz')
META = json.loads(str(GOLDEN['meta']))


sinkhorn = jax.jit(
    swav.sinkhorn_codes, static_argnames=('epsilon', 'num_iters', 'powerlaw', 'axis_names')
)


def replica_loss(meta, embeddings, prototypes, queue):
    """One replica's loss, codes and gradients, and its queue after the step."""
    num_crops, assign = meta['num_crops'], tuple(meta['crops_for_assign'])
    weights = lax.pcast(jnp.ones(meta['batch_per_replica']), AXES, to='varying')
    prototypes = lax.pcast(prototypes, AXES, to='varying')

    def loss_of(embeddings, prototypes):
        old_scores = queue and [queue.embeddings @ lax.stop_gradient(p) for p in prototypes]
        return swav.swav_loss(
            [(embeddings @ p).reshape(num_crops, -1, p.shape[1]) for p in prototypes],
            old_scores,
            queue,
            weights,
            swav.SwAVSettings(
                crops_for_assign=assign,
                temperature=meta['temperature'],
                epsilon=meta['epsilon'],
                num_iters=meta['num_iters'],
                shk_powerlaw=meta['shk_powerlaw'],
                use_double_precision=meta['use_double_precision'],
            ),
            hard_assignment=meta['hard_assignment'],
            axis_names=AXES,
        )

    (loss, codes), grads = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(embeddings, prototypes)
    grad_embeddings, grad_prototypes = grads
    if queue is not None:
        crops = embeddings.reshape(num_crops, -1, embeddings.shape[-1])
        queue = queue.push(crops[jnp.array(assign)], weights)
    return (
        loss[None],
        [c[None] for c in codes],
        grad_embeddings,
        lax.pmean(grad_prototypes, AXES),
        queue,
    )


@pytest.mark.parametrize('case', META)
def test_loss_codes_gradients_and_queue_equal_vissls(case):
    meta = META[case]
    world, batch, crops = meta['world'], meta['batch_per_replica'], meta['num_crops']
    dim, assign = meta['embedding_dim'], len(meta['crops_for_assign'])
    heads = range(len(meta['num_prototypes']))
    mesh = make_mesh({'enabled': True, 'group_size': 0}, jax.devices()[:world])

    queue = specs = None
    if meta['local_queue_length']:
        # (world, assign, batches × B, D) → ours: (assign, batches, world × B, D).
        stored = GOLDEN[f'{case}/queue'].reshape(world, assign, -1, batch, dim)
        stored = stored.transpose(1, 2, 0, 3, 4).reshape(assign, -1, world * batch, dim)
        batches = stored.shape[1]
        queue = swav.Queue(stored, np.ones((batches, world * batch), np.float32), np.int32(batches))
        specs = swav.Queue(P(None, None, AXES), P(None, AXES), P())
    with jax.enable_x64(meta['use_double_precision']):
        loss, codes, grad_embeddings, grad_prototypes, queue = jax.jit(
            jax.shard_map(
                partial(replica_loss, meta),
                mesh=mesh,
                in_specs=(BATCH, P(), specs),
                out_specs=(BATCH, BATCH, BATCH, P(), specs),
            )
        )(
            GOLDEN[f'{case}/embeddings'].reshape(-1, dim),
            [GOLDEN[f'{case}/prototypes{h}'].T for h in heads],
            queue,
        )

    def check(actual, name):
        expected = GOLDEN[f'{case}/{name}']
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())

    check(loss, 'loss')
    check(np.reshape(grad_embeddings, (world, crops, batch, dim)), 'grad_embeddings')
    for h in heads:
        check(codes[h], f'assignments{h}')
        check(grad_prototypes[h].T, f'grad_prototypes{h}')
    if queue is not None:
        after = np.reshape(queue.embeddings, (assign, -1, world, batch, dim))
        after = after.transpose(2, 0, 1, 3, 4).reshape(world, assign, -1, dim)
        check(after, 'queue_after')


def sinkhorn_by_definition(scores, epsilon, num_iters, shares):
    """Equations 3 to 5 of the paper as they stand, in float64: scores (N, K) → codes (N, K)."""
    q = np.exp(scores.astype(np.float64) / epsilon)
    for _ in range(num_iters):
        q *= shares / q.sum(0)
        q /= q.sum(1, keepdims=True)
    return q


scores_of = st.builds(
    lambda seed, size, spread: jnp.clip(
        spread * np.random.default_rng(seed).standard_normal((1, *size)).astype(np.float32), -1, 1
    ),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(1, 2), (1, 30), (40, 2), (23, 17)]),  # few, since each is compiled
    st.sampled_from([0.0, 0.01, 0.3, 10.0]),
)
some = partial(settings, deadline=None, max_examples=40)


@some()
@given(scores_of, st.sampled_from([0.001, 0.01, 0.05, 1.0]), st.integers(1, 5))
def test_codes_are_distributions_for_any_scores_and_epsilon(scores, epsilon, num_iters):
    (codes,) = sinkhorn([scores], epsilon=epsilon, num_iters=num_iters)
    assert np.isfinite(codes).all()
    assert (np.asarray(codes) >= 0).all()
    np.testing.assert_allclose(codes.sum(-1), 1, rtol=1e-5)


@some()
@given(scores_of, st.integers(1, 5), st.sampled_from([0.0, 0.5, 2.0]))
def test_codes_equal_the_definition(scores, num_iters, powerlaw):
    shares = np.arange(1, scores.shape[-1] + 1) ** -powerlaw
    expected = sinkhorn_by_definition(np.asarray(scores[0]), 0.05, num_iters, shares / shares.sum())
    (codes,) = sinkhorn([scores], epsilon=0.05, num_iters=num_iters, powerlaw=powerlaw)
    np.testing.assert_allclose(codes[0], expected, atol=2e-5)


@some()
@given(scores_of)
def test_prototypes_get_equal_mass_after_enough_rounds(scores):
    (codes,) = swav.sinkhorn_codes([scores], epsilon=0.5, num_iters=50)
    mass = codes[0].sum(0) * scores.shape[2] / scores.shape[1]
    np.testing.assert_allclose(mass, 1, atol=1e-3)


@some()
@given(scores_of, st.randoms())
def test_codes_follow_their_images(scores, random):
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    (codes,) = sinkhorn([scores], epsilon=0.05, num_iters=3)
    (permuted,) = sinkhorn([scores[:, np.array(order)]], epsilon=0.05, num_iters=3)
    np.testing.assert_allclose(permuted[0], codes[0, np.array(order)], atol=1e-5)


def test_a_sample_of_weight_0_does_not_count_for_the_others():
    scores = jax.random.uniform(jax.random.key(0), (2, 12, 5), minval=-1, maxval=1)
    weights = jnp.array([1.0] * 9 + [0.0] * 3)
    (weighted,) = sinkhorn([scores], epsilon=0.05, num_iters=3, weights=weights)
    (without,) = sinkhorn([scores[:, :9]], epsilon=0.05, num_iters=3)
    np.testing.assert_allclose(weighted[:, :9], without, rtol=1e-5)
    (none,) = sinkhorn([scores], epsilon=0.05, num_iters=3, weights=0 * weights)
    assert np.isfinite(none).all()


def test_heads_are_assigned_as_if_alone():
    rng = np.random.default_rng(0)
    heads = [jnp.asarray(rng.uniform(-1, 1, (2, 8, k)), jnp.float32) for k in (5, 9)]
    together = sinkhorn(heads, epsilon=0.05, num_iters=3)
    for scores, codes in zip(heads, together, strict=True):
        (alone,) = sinkhorn([scores], epsilon=0.05, num_iters=3)
        np.testing.assert_allclose(codes, alone, rtol=1e-5)


@pytest.mark.parametrize('num_iters', [1, 3, 5])
def test_a_round_is_one_all_reduce_and_one_goes_before(num_iters):
    mesh = make_mesh({'enabled': True, 'group_size': 0})
    codes = jax.shard_map(
        lambda *heads: swav.sinkhorn_codes(
            heads, epsilon=0.05, num_iters=num_iters, axis_names=AXES
        ),
        mesh=mesh,
        in_specs=P(None, AXES),
        out_specs=P(None, AXES),
    )
    text = jax.jit(codes).lower(jnp.zeros((2, 16, 4)), jnp.zeros((2, 16, 6))).compile().as_text()
    assert text.count(' all-reduce(') == num_iters + 1


def test_queue_is_used_once_full_and_drops_the_oldest_batch():
    queue = swav.Queue.empty(num_assign=1, num_batches=2, num_images=3, dim=1)
    for i in range(3):
        assert bool(queue.is_full()) == (i >= 2)
        queue = queue.push(jnp.full((1, 3, 1), float(i)), jnp.ones(3))
    np.testing.assert_array_equal(queue.embeddings[0, :, 0, 0], [2, 1])


def test_a_queue_that_is_not_full_changes_nothing():
    rng = np.random.default_rng(0)
    scores = [jnp.asarray(rng.uniform(-1, 1, (3, 4, 7)), jnp.float32)]
    half = swav.Queue.empty(2, 2, 4, 1).push(jnp.ones((2, 4, 1)), jnp.ones(4))
    old = [jnp.asarray(rng.uniform(-1, 1, (2, 2, 4, 7)), jnp.float32)]
    loss = partial(swav.swav_loss, settings=swav.SwAVSettings())
    with_queue, _ = loss(scores, old, half, jnp.ones(4))
    without, _ = loss(scores, None, None, jnp.ones(4))
    np.testing.assert_allclose(with_queue, without, rtol=1e-6)
    full, _ = loss(scores, old, half.push(jnp.ones((2, 4, 1)), jnp.ones(4)), jnp.ones(4))
    assert abs(float(full - without)) > 1e-3


def test_prototypes_are_normalised_and_nothing_else():
    kernel = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    kernel[:, 1] = 0
    params = {
        'trunk': {'kernel': kernel},
        'head': {'linear0': {'kernel': kernel}, 'prototypes0': {'kernel': kernel}},
    }
    after = swav.normalize_prototypes(params)
    lengths = np.linalg.norm(after['head']['prototypes0']['kernel'], axis=0)
    np.testing.assert_allclose(lengths, [1, 0, 1], rtol=1e-6)
    np.testing.assert_array_equal(after['head']['linear0']['kernel'], kernel)
    np.testing.assert_array_equal(after['trunk']['kernel'], kernel)
