"""Networks by name: a trunk, SwAV's head, and both in one module."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from swav_jax.config import default
from swav_jax.config.settings import WIDEST
from swav_jax.errors import UserError
from swav_jax.models import regnet
from swav_jax.models.conv import Conv
from swav_jax.models.head import ACTIVATIONS, SwAVHead
from swav_jax.models.norm import BatchNorm
from swav_jax.models.regnet import RegNet
from swav_jax.models.remat import scan_passes
from swav_jax.models.resnet import BLOCKS, ResNet, expansion, stem_width

# Settings under config.model.trunk that a trunk reads, beside `name` and `stem`; a RegNet that goes
# by torchvision's name reads none.
READS = {
    'resnet': (
        'depth',
        'width_multiplier',
        'groups',
        'width_per_group',
        'layer4_stride',
        'zero_init_residual',
    ),
    'regnet': regnet.Parameters._fields,
}


class SwAVNet(nn.Module):
    """A trunk and SwAV's head; parameters under 'trunk' and 'head'."""

    trunk: nn.Module
    head: nn.Module

    def __call__(
        self, crops: list[jax.Array], train: bool, recompute_passes: bool = False
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Embeds all crops: one trunk pass per list entry, one head pass over them all.

        Trunk statistics thus see each resolution apart and move once for each, in order; the
        head's see all crops together, once.

        Args:
          crops: per resolution, images (n_g·B, S_g, S_g, channels).
          train: use and record the batch's statistics (`mutable=['batch_stats']`).
          recompute_passes: of a trunk pass keep nothing but the result; the backward pass computes
            it again, and thus holds the activations of one pass at a time. Equal shapes are
            compiled once.

        Returns:
          embeddings (V·B, D) with V = Σ n_g, and per prototype head scores (V·B, K).
        """
        if recompute_passes:
            features = jnp.concatenate(scan_passes(self.trunk, crops, train))
        else:
            features = jnp.concatenate([self.trunk(images, train) for images in crops])
        return self.head(features, train)

    def features(self, images: jax.Array) -> jax.Array:
        """Pooled trunk features (N, F) of images (N, H, W, channels), in eval mode."""
        return self.trunk(images, False)

    def embed(self, images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Embeddings (N, D) and scores (N, K) of images (N, H, W, channels), in eval mode."""
        return self.head(self.trunk(images, False), False)


def build(
    model_config: ConfigDict,
    *,
    channels: int = 3,
    dtype: Any = jnp.float32,
    axis_names: tuple[str, ...] | None = None,
    mesh_axes: tuple[str, ...] | None = None,
) -> SwAVNet:
    """The network that `config.model` describes.

    Args:
      model_config: `config.model`.
      channels: of the images.
      dtype: in which convolutions, linear layers and activations compute; parameters, statistics,
        features, embeddings and scores are float32, or float64 with float64.
      axis_names: mesh axes over which BatchNorm shares its statistics; None: it does not.
      mesh_axes: all axes of the `shard_map` the network trains in, over which running statistics
        are kept equal; None: those of `axis_names`.

    Raises:
      UserError: for a setting that names no network.
    """
    axis_names = tuple(axis_names or ())
    mesh_axes = axis_names if mesh_axes is None else tuple(mesh_axes)
    conv = partial(Conv, dtype=dtype)
    norm = partial(BatchNorm, dtype=dtype, axis_names=axis_names, mesh_axes=mesh_axes)
    return SwAVNet(
        trunk=build_trunk(model_config, conv=conv, norm=norm),
        head=_build_head(model_config, norm=norm, dtype=dtype),
    )


def build_trunk(model_config: ConfigDict, *, conv: Any, norm: Any) -> nn.Module:
    """The trunk that `config.model` describes, made of the given layers."""
    trunk = model_config.trunk
    _check_trunk(trunk)
    if trunk.name == 'resnet':
        make = partial(ResNet, **{key: trunk[key] for key in READS['resnet']})
    else:
        make = partial(RegNet, _regnet_parameters(trunk))
    return make(stem=trunk.stem, remat=model_config.remat, conv=conv, norm=norm)


def trunk_output_dim(trunk_config: ConfigDict) -> int:
    """Width F of the pooled features of `config.model.trunk`.

    Raises:
      UserError: for a setting that names no network.
    """
    _check_trunk(trunk_config)
    if trunk_config.name == 'resnet':
        return 8 * stem_width(trunk_config.width_multiplier) * expansion(trunk_config.depth)
    return regnet.stages(_regnet_parameters(trunk_config))[-1].width


def _regnet_parameters(trunk: ConfigDict) -> regnet.Parameters:
    if trunk.name in regnet.NAMED:
        return regnet.NAMED[trunk.name]
    return regnet.Parameters(*(trunk[key] for key in regnet.Parameters._fields))


def _build_head(model_config: ConfigDict, *, norm: Any, dtype: Any) -> SwAVHead:
    head = model_config.head
    output_dim = trunk_output_dim(model_config.trunk)
    first, *dims = head.dims
    if not dims:
        raise UserError(
            f'config.model.head.dims is {tuple(head.dims)}: give at least two widths, the '
            "trunk's (or 0 to have it inferred) and that of the embeddings"
        )
    if first and first != output_dim:
        raise UserError(
            f'config.model.head.dims begins with {first}, but the trunk puts out {output_dim} '
            f'features: begin it with {output_dim}, or with 0 to have it inferred'
        )
    activation = head.activation_name.lower()
    if activation not in ACTIVATIONS:
        raise UserError(
            f'config.model.head.activation_name is {head.activation_name!r}: '
            f'choose one of {", ".join(ACTIVATIONS)}'
        )
    return SwAVHead(
        dims=tuple(dims),
        num_clusters=tuple(head.num_clusters),
        use_bn=head.use_bn,
        use_bias=head.use_bias,
        skip_last_bn=head.skip_last_bn,
        normalize_feats=head.normalize_feats,
        activation_name=activation,
        weight_norm_prototypes=head.use_weight_norm_prototypes,
        norm=norm,
        dtype=dtype,
    )


def _check_trunk(trunk: ConfigDict) -> None:
    names = ('resnet', 'regnet', *regnet.NAMED)
    _check_choice(trunk, 'name', names)
    _check_choice(trunk, 'stem', ('imagenet', 'small'))
    reads = ('name', 'stem', *READS.get(trunk.name, ()))
    for key, unset in default().model.trunk.items():
        if key not in reads and trunk[key] != unset:
            raise UserError(
                f'config.model.trunk.{key} is {trunk[key]}, which the trunk {trunk.name!r} does '
                f'not have: leave it at {unset}'
            )
    if trunk.name == 'resnet':
        _check_resnet(trunk)


def _check_resnet(trunk: ConfigDict) -> None:
    _check_choice(trunk, 'depth', tuple(BLOCKS))
    _check_choice(trunk, 'layer4_stride', (1, 2))
    for key in ('width_multiplier', 'groups', 'width_per_group'):
        if not trunk[key] > 0:
            raise UserError(f'config.model.trunk.{key} is {trunk[key]}: give a positive number')
    if expansion(trunk.depth) == 1 and (trunk.groups, trunk.width_per_group) != (1, 64):
        raise UserError(
            f'config.model.trunk.depth {trunk.depth} has no grouped convolutions (groups is '
            f'{trunk.groups}, width_per_group {trunk.width_per_group}): use depth 50 or more, or '
            f'groups 1 and width_per_group 64'
        )
    planes = 8 * stem_width(trunk.width_multiplier)
    widest = trunk.groups * max(1, int(planes * trunk.width_per_group / 64))
    if widest > WIDEST:
        raise UserError(
            f'config.model.trunk.width_per_group={trunk.width_per_group} in '
            f'config.model.trunk.groups={trunk.groups} with width_multiplier '
            f'{trunk.width_multiplier} makes convolutions of {widest:,} channels: lower them, '
            f'{WIDEST:,} is the most'
        )


def _check_choice(trunk: ConfigDict, key: str, allowed: tuple) -> None:
    if trunk[key] not in allowed:
        choices = ', '.join(map(str, allowed))
        raise UserError(f'config.model.trunk.{key} is {trunk[key]!r}: choose one of {choices}')
