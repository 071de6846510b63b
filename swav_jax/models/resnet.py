"""ResNet and ResNeXt (He et al., 2016; Xie et al., 2017) with VISSL's parameters, NHWC.

Module names follow torchvision's state dict: `layer1.0.conv1` is `layer1_0/conv1`, and
`layer1.0.downsample.0` is `layer1_0/downsample_0`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax

from swav_jax.config import trunks
from swav_jax.models.pool import average_pool, max_pool
from swav_jax.models.relu import relu
from swav_jax.models.remat import run_stage
from swav_jax.models.trunk import Trunk


class BasicBlock(nn.Module):
    """Two 3×3 convolutions: depths 18 and 34."""

    planes: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    last_norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) → (N, H / stride, W / stride, planes)."""
        y = self.conv(self.planes, 3, self.stride, name='conv1')(x)
        y = relu(self.norm(name='bn1')(y, train))
        y = self.conv(self.planes, 3, name='conv2')(y)
        y = self.last_norm(name='bn2')(y, train)
        return relu(y + shortcut(self, x, y.shape, train))


class Bottleneck(nn.Module):
    """1×1, 3×3 with the stride and the groups, 1×1 to four times the width: depths 50 and up."""

    planes: int
    stride: int
    width: int
    groups: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    last_norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) → (N, H / stride, W / stride, 4·planes)."""
        y = self.conv(self.width, 1, name='conv1')(x)
        y = relu(self.norm(name='bn1')(y, train))
        y = self.conv(self.width, 3, self.stride, self.groups, name='conv2')(y)
        y = relu(self.norm(name='bn2')(y, train))
        y = self.conv(4 * self.planes, 1, name='conv3')(y)
        y = self.last_norm(name='bn3')(y, train)
        return relu(y + shortcut(self, x, y.shape, train))


def shortcut(block: nn.Module, x: jax.Array, shape: tuple[int, ...], train: bool) -> jax.Array:
    """The block's input, projected where the block changes its shape."""
    if block.stride == 1 and x.shape[-1] == shape[-1]:
        return x
    x = block.conv(shape[-1], 1, block.stride, name='downsample_0')(x)
    return block.norm(name='downsample_1')(x, train)


class ResNet(Trunk):
    """ResNet and ResNeXt. See `Trunk`."""

    settings: trunks.ResNet

    torch_blocks = r'layer\d+\.\d+'

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, grid: int = 1) -> jax.Array:
        """See `Trunk`."""
        width = self.settings.stem_width
        if self.settings.stem == 'imagenet':
            x = self.conv(width, 7, 2, name='conv1')(x)
        else:
            x = self.conv(width, 3, name='conv1')(x)
        x = relu(self.norm(name='bn1')(x, train))
        if self.settings.stem == 'imagenet':
            x = max_pool(x)

        strides = (1, 2, 2, self.settings.layer4_stride)
        for stage, depth in enumerate(trunks.BLOCKS[self.settings.depth]):
            block = self._block(width * 2**stage)
            blocks = [
                partial(block, stride=strides[stage] if i == 0 else 1, name=f'layer{stage + 1}_{i}')
                for i in range(depth)
            ]
            x = run_stage(self, x, blocks, train)
        return average_pool(x, grid)

    def _block(self, planes: int) -> Callable[..., nn.Module]:
        zero = self.settings.zero_init_residual
        last_init = nn.initializers.zeros if zero else nn.initializers.ones
        last_norm = partial(self.norm, scale_init=last_init)
        shared = dict(planes=planes, conv=self.conv, norm=self.norm, last_norm=last_norm)
        if not self.settings.has_bottlenecks:
            return partial(BasicBlock, **shared)
        width = self.settings.grouped_width(planes)
        return partial(Bottleneck, width=width, groups=self.settings.groups, **shared)

    @staticmethod
    def torch_name(modules: Sequence[str], layout: str) -> str:
        """See `Trunk`."""
        name = '.'.join(modules).replace('_', '.')
        return f'_feature_blocks.{name}' if layout == 'vissl' else name
