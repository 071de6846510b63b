"""PyTorch weights in and out, in the layouts of torchvision, VISSL and facebookresearch/swav."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from swav_jax import models
from swav_jax.errors import UserError, printable
from swav_jax.models.trunk import Trunk
from swav_jax.torch_weights.files import FORMATS, locate, read_tensors, write
from swav_jax.torch_weights.layouts import (
    LAYOUTS,
    Key,
    flatten,
    from_torch_axes,
    in_head,
    inner_name,
    inner_names,
    outer_name,
    projection_layers,
    sequential_places,
    to_torch_axes,
)
from swav_jax.torch_weights.unwrap import of_part, unwrapped

__all__ = ['FORMATS', 'LAYOUTS', 'load_into', 'read', 'to_torch', 'unwrapped', 'write']

_CLASSIFIERS = re.compile(r'(fc|clf|classifier)\.')


def to_torch(
    variables: Mapping[str, Any],
    layout: str,
    trunk: Trunk | type[Trunk],
    *,
    activation: bool = True,
) -> dict[str, np.ndarray]:
    """A state dict, by its full flat names, in PyTorch's order of axes.

    Args:
      variables: of a `SwAVNet`.
      layout: 'torchvision' has only the trunk; 'vissl' and 'swav' also have head and prototypes.
      trunk: the network's trunk, or its class.
      activation: whether the head has activations, which take places in its nn.Sequential
        (`activation_name` other than 'none').

    Raises:
      UserError: the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise UserError(f'layout is {layout!r}: choose one of {", ".join(LAYOUTS)}')
    tensors = flatten(variables)
    layers = projection_layers(tensors)
    names = inner_names(tensors, layout, sequential_places(layers, activation), trunk)
    prototypes = {key[2] for key in tensors if key[2].startswith('prototypes')}
    state = {}
    for key, value in tensors.items():
        if layout == 'torchvision' and key[1] == 'head':
            continue
        name = outer_name(names[key], layout, len(layers) == 1, len(prototypes) == 1)
        state[name] = to_torch_axes(key, np.asarray(value))
        if key[-1] == 'var':
            state[name.replace('running_var', 'num_batches_tracked')] = np.zeros((), np.int64)
    return state


def load_into(
    variables: Mapping[str, Any],
    path: str | Path,
    trunk: Trunk | type[Trunk],
    *,
    allow_partial: bool | None = None,
) -> dict[str, Any]:
    """Replace variables by PyTorch weights, or by those of another run, and print what was loaded.

    A head that the file does not have, or has in other shapes, keeps its values. So do trunk
    tensors with `allow_partial`.

    Args:
      variables: of a `SwAVNet`; values are converted to their dtypes.
      path: see `read`.
      trunk: the network's trunk, or its class.
      allow_partial: load what fits of a file that is not of this trunk; None is False, and no
        error suggests `config.init_allow_partial`.

    Raises:
      UserError: the file cannot be read, is not of this trunk, nothing of it fits, or a tensor
        that fits holds something other than finite real numbers.
    """
    found = read(path)
    tensors = flatten(variables)
    places = sorted({int(i) for n in found for i in re.findall(r'^projection_head\.(\d+)\.', n)})
    candidates = [inner_names(tensors, layout, places, trunk) for layout in LAYOUTS]
    names = max(candidates, key=lambda names: len(found.keys() & names.values()))

    loaded, problems = {}, {'missing': [], 'unexpected': [], 'misshapen': []}
    for key, value in tensors.items():
        name = names[key]
        if name not in found:
            problems['missing'].append(name)
            continue
        needed = to_torch_axes(key, np.empty(value.shape, np.bool_)).shape
        if found[name].shape == needed:
            _check_numbers(path, name, found[name], value.dtype)
            loaded[key] = from_torch_axes(key, found[name]).astype(value.dtype)
        else:
            problems['misshapen'].append(f'{name} {found[name].shape} instead of {needed}')
    unknown = [n for n in found.keys() - set(names.values()) if 'num_batches_tracked' not in n]
    left_out = sorted(n for n in unknown if _CLASSIFIERS.match(n))
    problems['unexpected'] = sorted(set(unknown) - set(left_out))

    _report(path, tensors, loaded, problems, left_out)
    _check_trunk(path, tensors, loaded, problems, allow_partial)
    return {kind: {} for kind in variables} | unflatten_dict(tensors | loaded)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The model's tensors in a file, by their names without the prefixes of the checkpoint.

    Args:
      path: a `.safetensors` file, what torch.save wrote, or the folder of a run, whose newest
        checkpoint is read. `FILE:student` reads the model whose tensors have names that begin with
        `student` in a file with several models.

    Raises:
      UserError: there is no such file, it is damaged, it holds more than tensors and plain data
        (nothing else is unpickled), it holds no tensors, or it holds several trunks.
    """
    path, part = locate(path)
    if path.is_dir():
        return _read_run(path)
    tensors = read_tensors(path)
    if part:
        tensors = of_part(path, part, tensors)
    return {inner_name(name): value for name, value in unwrapped(tensors, path).items()}


def _read_run(workdir: Path) -> dict[str, np.ndarray]:
    from swav_jax.runs.checkpoint import Checkpoints

    if not (workdir / 'checkpoints').is_dir():
        raise UserError(
            f'{printable(workdir)} does not hold checkpoints: give PyTorch weights or the '
            'folder of a run'
        )

    def trunk_of(metadata: Mapping[str, Any]) -> type[Trunk]:
        return models.trunk_class(metadata['config']['model']['trunk'])

    with contextlib.closing(Checkpoints(workdir / 'checkpoints')) as checkpoints:
        _, variables, metadata = checkpoints.read(('params', 'batch_stats'), accept=trunk_of)
    state = to_torch(variables, 'swav', trunk_of(metadata))
    return {inner_name(name.removeprefix('module.')): value for name, value in state.items()}


# What the user reads


def _report(
    path: str | Path,
    tensors: Mapping[Key, Any],
    loaded: Mapping[Key, Any],
    problems: Mapping[str, list[str]],
    left_out: list[str],
) -> None:
    print(f'weights of {printable(path)}')
    for part in ('trunk', 'head'):
        covered, total = _coverage(tensors, loaded, part)
        kept = '' if covered == total else f'; {total - covered} keep the values they had'
        print(f'  {part}: {covered} of {total} tensors loaded{kept}')
    for kind, names in problems.items():
        for name in names:
            print(f'  {kind}: {printable(name)}')
    if left_out:
        print(f'  left out, no part of this model: {", ".join(map(printable, left_out))}')


def _check_numbers(path: str | Path, name: str, value: np.ndarray, dtype: Any) -> None:
    trouble = None
    if value.dtype.kind != 'f':
        trouble = f'holds {value.dtype} numbers'
    elif not np.isfinite(value).all():
        trouble = f'holds {np.sum(~np.isfinite(value)):,} values that are not finite'
    elif (np.abs(value) > np.finfo(dtype).max).any():
        trouble = f'holds numbers too large for {np.dtype(dtype)}'
    if trouble:
        raise UserError(
            f'{printable(path)} cannot be used: its {printable(name)} {trouble}: give weights of '
            'finite floating-point numbers'
        )


def _coverage(tensors: Mapping[Key, Any], loaded: Mapping[Key, Any], part: str) -> tuple[int, int]:
    covered, total = (sum(key[1] == part for key in keys) for keys in (loaded, tensors))
    return covered, total


def _check_trunk(
    path: str | Path,
    tensors: Mapping[Key, Any],
    loaded: Mapping[Key, Any],
    problems: Mapping[str, list[str]],
    allow_partial: bool | None,
) -> None:
    lists = []
    for kind, names in problems.items():
        if names := [name for name in names if not in_head(name)]:
            more = f' and {len(names) - 3} more' if len(names) > 3 else ''
            lists.append(f'{len(names)} {kind}: {", ".join(map(printable, names[:3]))}{more}')
    covered, total = _coverage(tensors, loaded, 'trunk')
    if lists and not (covered and allow_partial):
        raise UserError(
            f'{printable(path)} is not of this trunk, it fills {covered} of its {total} tensors ('
            f'{"; ".join(lists)}): set config.model.trunk as it was when they were trained'
            + (', or config.init_allow_partial' if covered and allow_partial is not None else '')
        )
