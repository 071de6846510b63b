"""PyTorch's own models, as references: torchvision's, and VISSL's wide ones made from them."""

from unittest import mock

import numpy as np
import torch
import torchvision
from torchvision.models.regnet import BlockParams

_compute_stages = BlockParams.from_init_params


def _compute_stages_on_cpu(*args, **kwargs):
    with torch.device('cpu'):
        return _compute_stages(*args, **kwargs)


def trunk(name: str, width_multiplier: int = 1) -> torch.nn.Module:
    """A torchvision model whose output is its pooled features, without memory or values."""
    # A RegNet computes its widths with tensors, which the meta device cannot.
    with (
        torch.device('meta'),
        mock.patch.object(BlockParams, 'from_init_params', _compute_stages_on_cpu),
    ):
        model = torchvision.models.get_model(name)
        if width_multiplier != 1:
            _widen(model, 64 * width_multiplier)
    model.fc = torch.nn.Identity()
    return model.eval()


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Gives all weights and statistics random float32 values, distributed as the golden data's.

    With larger biases a squeeze-and-excitation network amplifies rounding a thousandfold.
    """
    rng = np.random.default_rng(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        value = rng.standard_normal(tensor.shape, np.float32)
        if name.endswith('num_batches_tracked'):
            value = np.zeros((), np.int64)
        elif name.endswith('running_var'):
            value = 1 + np.abs(value) / 10
        elif tensor.ndim == 1:
            value = value / 10 + name.endswith('.weight')
        else:
            value *= np.float32(np.sqrt(2 / np.prod(tensor.shape[1:])))
        state[name] = torch.from_numpy(value)
    model.load_state_dict(state, assign=True)


def _widen(model: torchvision.models.ResNet, width: int) -> None:
    """VISSL's width multiplier: all stages of a bottleneck ResNet are made anew from `width` on."""
    model.inplanes = width
    model.conv1 = torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)
    model.bn1 = torch.nn.BatchNorm2d(width)
    for i, stride in enumerate((1, 2, 2, 2)):
        depth = len(getattr(model, f'layer{i + 1}'))
        block = torchvision.models.resnet.Bottleneck
        setattr(model, f'layer{i + 1}', model._make_layer(block, width * 2**i, depth, stride))
