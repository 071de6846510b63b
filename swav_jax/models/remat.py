"""What the backward pass computes again instead of keeping (Chen et al., 2016, 1604.06174)."""

import itertools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

# BatchNorm's sums over the replicas are kept, so that nothing is all-reduced again.
STATISTICS = 'batch_statistics'
_KEEP = jax.checkpoint_policies.save_only_these_names(STATISTICS)


def recompute(
    apply: Callable[[nn.Module, jax.Array], jax.Array], when: bool
) -> Callable[[nn.Module, jax.Array], jax.Array]:
    """`apply(module, x)`; with `when` only the input and BatchNorm's sums are kept of it."""
    return nn.remat(apply, policy=_KEEP) if when else apply


def run_stage(
    trunk: nn.Module, x: jax.Array, blocks: Sequence[Callable[..., nn.Module]], train: bool
) -> jax.Array:
    """Run the blocks in sequence, as children of `trunk`, and keep what its `remat` says."""

    def run_block(block, x):
        return block(x, train)

    def run_blocks(trunk, x):
        for block in blocks:
            x = recompute(run_block, trunk.remat == 'block')(block(parent=trunk), x)
        return x

    return recompute(run_blocks, trunk.remat == 'stage')(trunk, x)


def scan_passes(trunk: nn.Module, crops: Sequence[jax.Array], train: bool) -> list[jax.Array]:
    """Features of each pass, without keeping anything else; passes of equal shape are a loop."""

    def run_pass(trunk, images):
        return trunk(images, train)

    def body(trunk, carry, images):
        return carry, recompute(run_pass, True)(trunk, images)

    loop = nn.scan(body, variable_broadcast='params', variable_carry='batch_stats')
    features = []
    for _, run in itertools.groupby(crops, key=lambda images: images.shape):
        _, found = loop(trunk, (), jnp.stack(list(run)))
        features.extend(found)
    return features
