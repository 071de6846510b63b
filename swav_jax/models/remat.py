"""What the backward pass computes again instead of keeping (Chen et al., 2016, 1604.06174)."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

REMAT = ('none', 'block', 'stage')

# BatchNorm's sums over the replicas are kept, so that nothing is all-reduced again.
STATISTICS = 'batch_statistics'
_KEEP = jax.checkpoint_policies.save_only_these_names(STATISTICS)


def recompute(
    apply: Callable[[nn.Module, jax.Array], jax.Array], when: bool
) -> Callable[[nn.Module, jax.Array], jax.Array]:
    """`apply(module, x)`, of which the backward pass keeps the input and BatchNorm's sums alone."""
    return nn.remat(apply, policy=_KEEP) if when else apply


def run_stage(
    trunk: nn.Module, x: jax.Array, blocks: Sequence[Callable[..., nn.Module]], train: bool
) -> jax.Array:
    """The blocks one after the other, as children of `trunk`, whose `remat` says what is kept."""

    def run_block(block, x):
        return block(x, train)

    def run_blocks(trunk, x):
        for block in blocks:
            x = recompute(run_block, trunk.remat == 'block')(block(parent=trunk), x)
        return x

    return recompute(run_blocks, trunk.remat == 'stage')(trunk, x)
