"""How PyTorch code bases name the tensors of our networks, and order their axes.

A layout maps the path of a tensor here to its name there. Inner names have no prefix of a
checkpoint: the trunk's own names, projection_head.N.… and prototypesN.….
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from swav_jax.models.trunk import Trunk

LAYOUTS = ('torchvision', 'vissl', 'swav')
VISSL = 'classy_state_dict.base_model.model.'

_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}

# The path of a tensor in the variables: collection, 'trunk' or 'head', modules, leaf.
Key = tuple[str, ...]


def inner_names(
    tensors: Mapping[Key, Any], layout: str, places: list[int], trunk: Trunk | type[Trunk]
) -> dict[Key, str]:
    """The inner name of each tensor.

    Args:
      tensors: by their paths.
      layout: one of `LAYOUTS`.
      places: indices of the projection's layers in nn.Sequential.
      trunk: the network's trunk, or its class.
    """
    place = dict(zip(projection_layers(tensors), places, strict=False))
    names = {}
    for key in tensors:
        *modules, leaf = key[2:]
        if key[1] == 'trunk':
            names[key] = f'{trunk.torch_name(modules, layout)}.{_LEAVES[leaf]}'
        elif modules[0].startswith('prototypes'):
            # The classic form of torch.nn.utils.weight_norm keeps a weight in two parts.
            weight = 'weight_v' if (*key[:-1], 'gain') in tensors else 'weight'
            names[key] = f'{modules[0]}.{"weight_g" if leaf == "gain" else weight}'
        else:
            layer = place.get(modules[0], modules[0])
            names[key] = f'projection_head.{layer}.{_LEAVES[leaf]}'
    return names


def projection_layers(tensors: Mapping[Key, Any]) -> list[str]:
    """linear0, bn0, linear1, …: the projection's layers in the order they are applied."""
    layers = {key[2] for key in tensors if key[1] == 'head' and key[2][0] in 'lb'}
    return sorted(layers, key=lambda name: (int(re.sub(r'\D', '', name)), name[0] == 'b'))


def sequential_places(layers: list[str], activation: bool) -> list[int]:
    """The layers' indices in nn.Sequential, if an activation follows each linear layer and norm."""
    places, place = [], 0
    for i, _ in enumerate(layers):
        places.append(place)
        next_is_linear = i + 1 < len(layers) and layers[i + 1][0] == 'l'
        place += 2 if activation and next_is_linear else 1
    return places


def inner_name(name: str) -> str:
    """The inner name for a name of any layout, whatever other tensors there are."""
    name = re.sub(r'^(trunk|heads(\.\d+)+)\.', '', name)
    name = re.sub(r'^projection_head\.(?=weight|bias)', 'projection_head.0.', name)
    name = re.sub(r'^prototypes\.(?=weight)', 'prototypes0.', name)
    name = re.sub(r'^prototypes\.(?=prototypes)', '', name)
    # torch.nn.utils.parametrizations.weight_norm, the newer form: original0 is the gain.
    return re.sub(
        r'\.parametrizations\.weight\.original([01])$',
        lambda match: '.weight_' + 'gv'[int(match[1])],
        name,
    )


def outer_name(name: str, layout: str, one_linear: bool, one_prototype_head: bool) -> str:
    """The full name for an inner name; the official repository numbers only one of several."""
    if layout == 'vissl':
        return VISSL + ('heads.0.' if in_head(name) else 'trunk.') + name
    if layout == 'torchvision':
        return name
    if one_linear:
        name = name.replace('projection_head.0.', 'projection_head.')
    if name.startswith('prototypes'):
        name = 'prototypes.' + name.removeprefix('prototypes0.' if one_prototype_head else '')
    return 'module.' + name


def in_head(name: str) -> bool:
    """Whether an inner name belongs to the projection or the prototypes."""
    return name.startswith(('projection_head', 'prototypes'))


def flatten(variables: Mapping[str, Any]) -> dict[Key, Any]:
    """The tensors of a `SwAVNet` by their paths, parameters first."""
    return flatten_dict({'params': variables['params']} | dict(variables))


def to_torch_axes(key: Key, value: np.ndarray) -> np.ndarray:
    """(h, w, in, out) → (out, in, h, w); (in, out) → (out, in); weight norm's (K,) → (K, 1)."""
    if key[-1] == 'gain':
        value = value[:, None]
    elif key[-1] == 'kernel':
        value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
    return np.ascontiguousarray(value)


def from_torch_axes(key: Key, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_axes`."""
    if key[-1] == 'gain':
        value = value[:, 0]
    elif key[-1] == 'kernel':
        value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0))
    return np.ascontiguousarray(value)
