"""RegNetX and RegNetY (Radosavovic et al., 2020), NHWC.

Module names follow torchvision's state dict: `trunk_output.block1.block1-0.f.a.0` is
`block1_0/a_0`, its `f.se.fc1` is `block1_0/se_fc1`.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from swav_jax.config import trunks
from swav_jax.models.pool import average_pool
from swav_jax.models.relu import relu
from swav_jax.models.remat import run_stage
from swav_jax.models.trunk import Trunk

# Modules within a block by torchvision's names, and by ClassyVision's, whose RegNet VISSL uses.
_TORCHVISION = {
    **{f'{part}_{i}': f'f.{part}.{i}' for part in 'abc' for i in (0, 1)},
    **{f'proj_{i}': f'proj.{i}' for i in (0, 1)},
    **{f'se_fc{i}': f'f.se.fc{i}' for i in (1, 2)},
}
_VISSL = _TORCHVISION | {
    'c_0': 'f.c',
    'c_1': 'f.final_bn',
    'proj_0': 'proj',
    'proj_1': 'bn',
    'se_fc1': 'f.se.excitation.0',
    'se_fc2': 'f.se.excitation.2',
}


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
        """Scale each channel by a function of all channels' means (Hu et al., 2018)."""
        wide = jnp.promote_types(y.dtype, jnp.float32)
        s = jnp.mean(y, (1, 2), keepdims=True, dtype=wide)
        s = relu(self.conv(squeezed, use_bias=True, name='se_fc1')(s))
        s = self.conv(y.shape[-1], use_bias=True, name='se_fc2')(s)
        return y * nn.sigmoid(s)


class RegNet(Trunk):
    """RegNetX and RegNetY. See `Trunk`."""

    settings: trunks.RegNet

    torch_blocks = r'trunk_output|res\d+'

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, grid: int = 1) -> jax.Array:
        """See `Trunk`."""
        stride = 2 if self.settings.stem == 'imagenet' else 1
        x = self.conv(trunks.RegNet.STEM_WIDTH, 3, stride, name='stem_0')(x)
        x = relu(self.norm(name='stem_1')(x, train))
        for i, stage in enumerate(self.settings.stages()):
            block = partial(
                Block,
                stage.width,
                stage.group_width,
                se_ratio=self.settings.se_ratio,
                conv=self.conv,
                norm=self.norm,
            )
            blocks = [
                partial(block, stride=2 if j == 0 else 1, name=f'block{i + 1}_{j}')
                for j in range(stage.depth)
            ]
            x = run_stage(self, x, blocks, train)
        return average_pool(x, grid)

    @staticmethod
    def torch_name(modules: Sequence[str], layout: str) -> str:
        """See `Trunk`."""
        vissl = layout == 'vissl'
        if block := re.fullmatch(r'block(\d+)_(\d+)', modules[0]):
            stage, index = block.groups()
            outer = f'res{int(stage) + 1}' if vissl else f'trunk_output.block{stage}'
            inner = (_VISSL if vissl else _TORCHVISION)[modules[1]]
            name = f'{outer}.block{stage}-{index}.{inner}'
        else:
            name = '.'.join(modules).replace('_', '.')
            name = f'conv1.{name}' if vissl else name
        return f'_feature_blocks.{name}' if vissl else name
