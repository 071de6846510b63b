"""RankMe, alignment and uniformity against their formulas, and near duplicates among prototypes."""

import numpy as np
import pytest

from swav_jax.evaluate import geometry


def test_effective_rank_counts_equal_directions():
    """Also for fewer images than dimensions, where the other Gram matrix is smaller."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 12)))[0]
    assert geometry.effective_rank(3 * basis) == pytest.approx(12)
    assert geometry.effective_rank(3 * basis.T) == pytest.approx(12)
    assert geometry.effective_rank(np.ones((50, 8))) == pytest.approx(1, abs=1e-6)
    assert geometry.effective_rank(np.zeros((5, 3))) == 1


def test_effective_rank_is_that_of_the_singular_values():
    x = np.random.default_rng(1).normal(size=(100, 20)) * np.arange(1, 21) + 2
    shares = np.linalg.svd(x, compute_uv=False)
    shares /= shares.sum()
    expected = np.exp(-np.sum(shares * np.log(shares)))
    assert geometry.effective_rank(np.float32(x)) == pytest.approx(expected, rel=1e-5)
    assert geometry.effective_rank(7 * x) == pytest.approx(expected), 'no matter of scale'


def test_alignment_is_a_squared_distance_of_unit_vectors():
    x = np.array([[2.0, 0.0], [0.0, 3.0]])
    assert geometry.alignment(x, 5 * x) == pytest.approx(0)
    assert geometry.alignment(x, x[::-1]) == pytest.approx(2)
    assert geometry.alignment(x, -x) == pytest.approx(4)


def test_uniformity_is_lower_the_more_evenly_embeddings_spread():
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(500, 64))
    bunched = spread + 5
    assert geometry.uniformity(np.ones((10, 4))) == pytest.approx(0)
    assert -4 < geometry.uniformity(spread) < geometry.uniformity(bunched) < 0
    # By its definition, with a loop over the pairs.
    x = geometry.unit(spread[:30])
    pairs = [np.sum((x[i] - x[j]) ** 2) for i in range(30) for j in range(i)]
    expected = np.log(np.mean(np.exp(-2 * np.array(pairs))))
    assert geometry.uniformity(spread[:30]) == pytest.approx(expected)


def test_many_embeddings_are_sampled_over_all_of_them():
    """Not the first 2,000: they may be of one class."""
    x = np.concatenate([np.tile([1.0, 0.0], (3000, 1)), np.tile([-1.0, 0.0], (3000, 1))])
    expected = np.log((1 + np.exp(-8)) / 2)
    assert geometry.uniformity(x) == pytest.approx(expected, abs=1e-3)


def test_near_duplicates_are_counted_beyond_the_first_block():
    rng = np.random.default_rng(0)
    prototypes = rng.normal(size=(2500, 64))
    assert geometry.near_duplicates(prototypes) == 0
    prototypes[2400] = 3 * prototypes[7] + 1e-3  # of another length, in another block
    prototypes[2401] = prototypes[2402]
    prototypes[50] = -prototypes[51]
    assert geometry.near_duplicates(prototypes) == 4
