"""RegNetX and RegNetY (Radosavovic et al., 2020), by torchvision's names or by parameters, NHWC.

Module names follow torchvision's state dict: `trunk_output.block1.block1-0.f.a.0` is
`block1_0/a_0`, its `f.se.fc1` is `block1_0/se_fc1`.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from swav_jax.config.settings import WIDEST
from swav_jax.errors import UserError
from swav_jax.models.relu import relu
from swav_jax.models.remat import run_stage

STEM_WIDTH = 32


class Stage(NamedTuple):
    """A run of equally wide blocks; the first halves the resolution."""

    depth: int
    width: int
    group_width: int


class Parameters(NamedTuple):
    """What generates a RegNet: see `stages`. `se_ratio` 0 leaves out squeeze-and-excitation."""

    depth: int
    w_0: int
    w_a: float
    w_m: float
    group_width: int
    se_ratio: float = 0.25


NAMED = {
    'regnet_y_400mf': Parameters(16, 48, 27.89, 2.09, 8),
    'regnet_y_800mf': Parameters(14, 56, 38.84, 2.4, 16),
    'regnet_y_1_6gf': Parameters(27, 48, 20.71, 2.65, 24),
    'regnet_y_3_2gf': Parameters(21, 80, 42.63, 2.66, 24),
    'regnet_y_8gf': Parameters(17, 192, 76.82, 2.19, 56),
    'regnet_y_16gf': Parameters(18, 200, 106.23, 2.48, 112),
    'regnet_y_32gf': Parameters(20, 232, 115.89, 2.53, 232),
    'regnet_y_128gf': Parameters(27, 456, 160.83, 2.52, 264),
    'regnet_x_400mf': Parameters(22, 24, 24.48, 2.54, 16, 0),
    'regnet_x_800mf': Parameters(16, 56, 35.73, 2.28, 16, 0),
    'regnet_x_1_6gf': Parameters(18, 80, 34.01, 2.25, 24, 0),
    'regnet_x_3_2gf': Parameters(25, 88, 26.31, 2.25, 48, 0),
    'regnet_x_8gf': Parameters(23, 80, 49.56, 2.88, 120, 0),
    'regnet_x_16gf': Parameters(22, 216, 55.59, 2.1, 128, 0),
    'regnet_x_32gf': Parameters(23, 320, 69.86, 2.0, 168, 0),
}


def stages(parameters: Parameters) -> list[Stage]:
    """The stages that the parameters generate, as in section 3.3 of the paper.

    Block j would be w_0 + w_a·j wide (eq. 2). Its width is rounded to w_0·w_m^s with whole s
    (eqs. 3, 4) and to a multiple of 8; equal widths form a stage. A stage's width is then moved
    to a multiple of its group width, by less than 10% downwards, as torchvision does.

    Raises:
      UserError: where they generate no network.
    """
    depth, w_0, w_a, w_m, group_width, _ = parameters
    for name, value, works in (
        ('depth', depth, depth >= 1),
        ('w_0', w_0, w_0 > 0 and w_0 % 8 == 0),
        ('w_a', w_a, w_a >= 0),
        ('w_m', w_m, w_m > 1),
        ('group_width', group_width, group_width >= 1),
    ):
        if not works:
            raise UserError(
                f'config.model.trunk.{name}={value}: a RegNet needs depth ≥ 1, w_0 a positive '
                'multiple of 8, w_a ≥ 0, w_m > 1 and group_width ≥ 1'
            )
    widths = []
    for j in range(depth):
        s = round(math.log((w_0 + w_a * j) / w_0) / math.log(w_m))
        widths.append(8 * round(w_0 * w_m**s / 8))
    if max(widths) > WIDEST:
        raise UserError(
            f'config.model.trunk.w_a={w_a} with depth {depth}, w_0 {w_0} and w_m {w_m} makes '
            f'blocks {max(widths):,} wide: lower them, {WIDEST:,} is the most'
        )
    narrowest = min(STEM_WIDTH, *widths)
    if parameters.se_ratio and round(parameters.se_ratio * narrowest) < 1:
        raise UserError(
            f'config.model.trunk.se_ratio={parameters.se_ratio} leaves none of {narrowest} '
            f'channels: use more than {0.5 / narrowest:g}, or 0 for no squeeze-and-excitation'
        )
    result = []
    for width, blocks in itertools.groupby(widths):
        group = min(group_width, width)
        result.append(Stage(len(list(blocks)), _multiple(width, group), group))
    return result


def _multiple(width: int, divisor: int) -> int:
    """The multiple of `divisor` nearest to `width`, or the next one above 90% of it."""
    nearest = max(1, (2 * width + divisor) // (2 * divisor)) * divisor
    return nearest if nearest >= 0.9 * width else nearest + divisor


class Block(nn.Module):
    """1×1, grouped 3×3 with the stride, squeeze-and-excitation, 1×1, all equally wide."""

    width: int
    group_width: int
    stride: int
    se_ratio: float
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) → (N, H / stride, W / stride, width)."""
        groups = self.width // self.group_width
        y = self.conv(self.width, 1, name='a_0')(x)
        y = relu(self.norm(name='a_1')(y, train))
        y = self.conv(self.width, 3, self.stride, groups, name='b_0')(y)
        y = relu(self.norm(name='b_1')(y, train))
        if self.se_ratio:
            # Relative to the block's input, which is narrower in the first block of a stage.
            y = self._squeeze_and_excite(y, round(self.se_ratio * x.shape[-1]))
        y = self.conv(self.width, 1, name='c_0')(y)
        y = self.norm(name='c_1')(y, train)
        if self.stride != 1 or x.shape[-1] != self.width:
            x = self.conv(self.width, 1, self.stride, name='proj_0')(x)
            x = self.norm(name='proj_1')(x, train)
        return relu(x + y)

    def _squeeze_and_excite(self, y: jax.Array, squeezed: int) -> jax.Array:
        """Scales each channel by a function of all channels' means (Hu et al., 2018)."""
        wide = jnp.promote_types(y.dtype, jnp.float32)
        s = jnp.mean(y, (1, 2), keepdims=True, dtype=wide)
        s = relu(self.conv(squeezed, use_bias=True, name='se_fc1')(s))
        s = self.conv(y.shape[-1], use_bias=True, name='se_fc2')(s)
        return y * nn.sigmoid(s)


class RegNet(nn.Module):
    """Images to pooled features.

    Attributes:
      parameters: what generates its stages.
      stem: 'imagenet' (3×3, stride 2) or 'small' (stride 1).
      remat: 'block' or 'stage': the backward pass computes each of them again.
      conv, norm: modules with dtype and synchronisation already set.
    """

    parameters: Parameters
    stem: str
    remat: str
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images (N, H, W, channels) → features (N, F), float32 or wider."""
        x = self.conv(STEM_WIDTH, 3, 2 if self.stem == 'imagenet' else 1, name='stem_0')(x)
        x = relu(self.norm(name='stem_1')(x, train))
        for i, stage in enumerate(stages(self.parameters)):
            block = partial(
                Block,
                stage.width,
                stage.group_width,
                se_ratio=self.parameters.se_ratio,
                conv=self.conv,
                norm=self.norm,
            )
            blocks = [
                partial(block, stride=2 if j == 0 else 1, name=f'block{i + 1}_{j}')
                for j in range(stage.depth)
            ]
            x = run_stage(self, x, blocks, train)
        return jnp.mean(x, (1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
