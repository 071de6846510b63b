"""ResNet and ResNeXt (He et al., 2016; Xie et al., 2017) with VISSL's parameters, NHWC.

Module names follow torchvision's state dict: `layer1.0.conv1` is `layer1_0/conv1`, and
`layer1.0.downsample.0` is `layer1_0/downsample_0`.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from swav_jax.models.pool import max_pool
from swav_jax.models.relu import relu
from swav_jax.models.remat import run_stage

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


def expansion(depth: int) -> int:
    """How many times wider a block's output is than its nominal width."""
    return 1 if depth < 50 else 4


def stem_width(width_multiplier: float) -> int:
    """Channels of the stem and nominal width of the first stage; each further stage doubles it."""
    return max(1, round(64 * width_multiplier))


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
    groups: int
    width_per_group: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    last_norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(N, H, W, C) → (N, H / stride, W / stride, 4·planes)."""
        width = max(1, int(self.planes * self.width_per_group / 64)) * self.groups
        y = self.conv(width, 1, name='conv1')(x)
        y = relu(self.norm(name='bn1')(y, train))
        y = self.conv(width, 3, self.stride, self.groups, name='conv2')(y)
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


class ResNet(nn.Module):
    """Images to pooled features.

    Attributes:
      depth: one of `BLOCKS`.
      width_multiplier: widens every stage and the output (VISSL's meaning; torchvision's
        wide_resnet50_2 is `width_per_group=128` instead).
      groups, width_per_group: of the 3×3 convolutions in bottlenecks (ResNeXt).
      layer4_stride: 1 keeps a larger last feature map, 2 is the classic one.
      zero_init_residual: starts each block as the identity (Goyal et al., 2017).
      stem: 'imagenet' (7×7, stride 2, max-pool) or 'small' (3×3, stride 1, no pooling).
      remat: 'block' or 'stage': the backward pass computes each of them again.
      conv, norm: modules with dtype and synchronisation already set.
    """

    depth: int
    width_multiplier: float
    groups: int
    width_per_group: int
    layer4_stride: int
    zero_init_residual: bool
    stem: str
    remat: str
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images (N, H, W, channels) → features (N, F), float32 or wider."""
        width = stem_width(self.width_multiplier)
        if self.stem == 'imagenet':
            x = self.conv(width, 7, 2, name='conv1')(x)
        else:
            x = self.conv(width, 3, name='conv1')(x)
        x = relu(self.norm(name='bn1')(x, train))
        if self.stem == 'imagenet':
            x = max_pool(x)

        strides = (1, 2, 2, self.layer4_stride)
        for stage in range(4):
            block = partial(self._block(), width * 2**stage)
            x = run_stage(
                self,
                x,
                [
                    partial(block, strides[stage] if i == 0 else 1, name=f'layer{stage + 1}_{i}')
                    for i in range(BLOCKS[self.depth][stage])
                ],
                train,
            )
        return jnp.mean(x, (1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))

    def _block(self) -> Callable[..., nn.Module]:
        last_init = nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        last_norm = partial(self.norm, scale_init=last_init)
        block = partial(BasicBlock, conv=self.conv, norm=self.norm, last_norm=last_norm)
        if expansion(self.depth) == 4:
            block = partial(Bottleneck, conv=self.conv, norm=self.norm, last_norm=last_norm)
            block = partial(block, groups=self.groups, width_per_group=self.width_per_group)
        return block
