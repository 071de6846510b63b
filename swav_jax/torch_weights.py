"""PyTorch weights in and out, in the layouts of torchvision, VISSL and facebookresearch/swav.

A layout is a rule from a tensor's path here to its name there; nothing else differs but the order
of axes. Reading finds the layout by the names in the file. Nothing that is read can run code: only
tensors and plain data are unpickled.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from swav_jax.errors import UserError

LAYOUTS = ('torchvision', 'vissl', 'swav')
FORMATS = ('pth', 'safetensors')

# What stands before the model's own names in a checkpoint. Where one is found, all names without
# it are those of optimizers and the like.
_VISSL = 'classy_state_dict.base_model.model.'
_WRAPPERS = (_VISSL, 'base_model.model.', 'state_dict.', 'model.', 'module.')
_CLASSIFIERS = re.compile(r'(fc|clf|classifier)\.')

_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}
_REGNET = {
    **{f'{part}_{i}': f'f.{part}.{i}' for part in 'abc' for i in (0, 1)},
    **{f'proj_{i}': f'proj.{i}' for i in (0, 1)},
    **{f'se_fc{i}': f'f.se.fc{i}' for i in (1, 2)},
}
_VISSL_REGNET = _REGNET | {
    'c_0': 'f.c',
    'c_1': 'f.final_bn',
    'proj_0': 'proj',
    'proj_1': 'bn',
    'se_fc1': 'f.se.excitation.0',
    'se_fc2': 'f.se.excitation.2',
}

# A tensor's place in the variables: collection, 'trunk' or 'head', modules, leaf.
Key = tuple[str, ...]


def to_torch(
    params: Mapping, batch_stats: Mapping, layout: str, *, activation: bool = True
) -> dict[str, np.ndarray]:
    """A state dict, by its full flat names, in PyTorch's order of axes.

    Args:
      params, batch_stats: of a `SwAVNet`.
      layout: 'torchvision' holds the trunk alone; 'vissl' and 'swav' head and prototypes, too.
      activation: whether the head has activations, which take places in its nn.Sequential
        (`activation_name` other than 'none').

    Raises:
      UserError: the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise UserError(f'layout is {layout!r}: choose one of {", ".join(LAYOUTS)}')
    tensors = _flatten(params, batch_stats)
    layers = _projection(tensors)
    names = _names(tensors, layout, _places(layers, activation))
    prototypes = {key[2] for key in tensors if key[2].startswith('prototypes')}
    state = {}
    for key, value in tensors.items():
        if layout == 'torchvision' and key[1] == 'head':
            continue
        name = _outer_name(names[key], layout, len(layers) == 1, len(prototypes) == 1)
        state[name] = _to_torch_axes(key, np.asarray(value))
        if key[-1] == 'var':
            state[name.replace('running_var', 'num_batches_tracked')] = np.zeros((), np.int64)
    return state


def load_into(
    params: Mapping, batch_stats: Mapping, path: str | Path, *, allow_partial: bool = False
) -> tuple[dict, dict]:
    """The variables with the values of a file of PyTorch weights, as far as it has them.

    Prints what was loaded. A head that the file does not have, or has in other shapes, keeps its
    values; so do trunk tensors with `allow_partial`.

    Args:
      params, batch_stats: of a `SwAVNet`; values are converted to their dtypes.
      path: a `.safetensors` file, or what torch.save wrote.
      allow_partial: load what fits of a file that is not of this trunk.

    Raises:
      UserError: the file cannot be read, is not of this trunk, or nothing of it fits.
    """
    found = read(path)
    tensors = _flatten(params, batch_stats)
    places = sorted({int(i) for n in found for i in re.findall(r'^projection_head\.(\d+)\.', n)})
    names = _names(tensors, _layout_of(found), places)

    loaded, problems = {}, {'missing': [], 'unexpected': [], 'misshapen': []}
    for key, value in tensors.items():
        name = names[key]
        if name not in found:
            problems['missing'].append(name)
            continue
        needed = _to_torch_axes(key, np.empty(value.shape, np.bool_)).shape
        if found[name].shape == needed:
            loaded[key] = _from_torch_axes(key, found[name]).astype(value.dtype)
        else:
            problems['misshapen'].append(f'{name} {found[name].shape} instead of {needed}')
    unknown = [n for n in found.keys() - set(names.values()) if 'num_batches_tracked' not in n]
    left_out = sorted(n for n in unknown if _CLASSIFIERS.match(n))
    problems['unexpected'] = sorted(set(unknown) - set(left_out))

    _report(path, tensors, loaded, problems, left_out)
    _check_trunk(path, tensors, loaded, problems, allow_partial)
    variables = unflatten_dict(tensors | loaded)
    return variables['params'], variables.get('batch_stats', {})


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The model's tensors in a file, by their names without what wraps the model there.

    Raises:
      UserError: there is no such file, it is damaged, it holds more than tensors and plain data
        (which is not unpickled), or it holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path} is not a file: give PyTorch weights (.pth or .safetensors)')
    torch = _torch()
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        if 'Unsupported global' in str(error):
            raise UserError(
                f'{path} holds Python objects, whose unpickling can run code, so nothing of it was '
                'loaded: save its tensors alone, torch.save(model.state_dict(), …)'
            ) from error
        reason = str(error).strip().partition('\n')[0][:100]
        raise UserError(
            f'{path} is damaged or not of PyTorch ({reason}): fetch it again'
        ) from error

    tensors = dict(_walk(content, torch))
    while prefix := next((p for p in _WRAPPERS if any(n.startswith(p) for n in tensors)), None):
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not tensors:
        raise UserError(f'{path} holds no tensors: give a state dict as torch.save writes it')
    return {_inner_name(name): value for name, value in tensors.items()}


def write(path: str | Path, state: Mapping[str, np.ndarray], file_format: str = 'pth') -> None:
    """Writes a state dict of `to_torch`, whole or not at all.

    VISSL's is nested in a .pth as VISSL nests it; a .safetensors file keeps the flat names.

    Raises:
      UserError: the format is unknown, or the file cannot be written.
    """
    if file_format not in FORMATS:
        raise UserError(f'format is {file_format!r}: choose one of {", ".join(FORMATS)}')
    path = Path(path)
    torch = _torch()
    tensors = {name: torch.from_numpy(value.copy()) for name, value in state.items()}
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if file_format == 'safetensors':
            from safetensors.torch import save_file

            save_file(tensors, temporary)
        else:
            torch.save(_nested(tensors), temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = str(error).partition('\n')[0]
        raise UserError(f'{path} cannot be written ({reason}): give another --out') from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# Names. Inner ones carry no wrapper: the trunk's own, projection_head.N.… and prototypesN.….


def _names(tensors: Mapping[Key, Any], layout: str, places: list[int]) -> dict[Key, str]:
    """Each tensor's inner name; `places` are those of the projection's layers in nn.Sequential."""
    place = dict(zip(_projection(tensors), places, strict=False))
    names = {}
    for key in tensors:
        *modules, leaf = key[2:]
        if key[1] == 'trunk':
            names[key] = _trunk_name(modules, leaf, layout)
        elif modules[0].startswith('prototypes'):
            # The classic form of torch.nn.utils.weight_norm keeps a weight in two parts.
            weight = 'weight_v' if (*key[:-1], 'gain') in tensors else 'weight'
            names[key] = f'{modules[0]}.{"weight_g" if leaf == "gain" else weight}'
        else:
            layer = place.get(modules[0], modules[0])
            names[key] = f'projection_head.{layer}.{_LEAVES[leaf]}'
    return names


def _trunk_name(modules: list[str], leaf: str, layout: str) -> str:
    vissl = layout == 'vissl'
    if block := re.fullmatch(r'block(\d+)_(\d+)', modules[0]):
        stage, index = block.groups()
        outer = f'res{int(stage) + 1}' if vissl else f'trunk_output.block{stage}'
        inner = (_VISSL_REGNET if vissl else _REGNET)[modules[1]]
        name = f'{outer}.block{stage}-{index}.{inner}'
    else:
        name = '.'.join(modules).replace('_', '.')
        name = name.replace('stem.', 'conv1.stem.') if vissl else name
    return f'{"_feature_blocks." if vissl else ""}{name}.{_LEAVES[leaf]}'


def _projection(tensors: Mapping[Key, Any]) -> list[str]:
    """linear0, bn0, linear1, …: the projection's layers in the order they are applied."""
    layers = {key[2] for key in tensors if key[1] == 'head' and key[2][0] in 'lb'}
    return sorted(layers, key=lambda name: (int(re.sub(r'\D', '', name)), name[0] == 'b'))


def _places(layers: list[str], activation: bool) -> list[int]:
    """Their indices in nn.Sequential, where an activation follows a linear layer and its norm."""
    places, place = [], 0
    for i, _ in enumerate(layers):
        places.append(place)
        next_is_linear = i + 1 < len(layers) and layers[i + 1][0] == 'l'
        place += 2 if activation and next_is_linear else 1
    return places


def _inner_name(name: str) -> str:
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


def _outer_name(name: str, layout: str, one_linear: bool, one_prototype_head: bool) -> str:
    if layout == 'vissl':
        return _VISSL + ('heads.0.' if _in_head(name) else 'trunk.') + name
    if layout == 'torchvision':
        return name
    if one_linear:
        name = name.replace('projection_head.0.', 'projection_head.')
    if name.startswith('prototypes'):
        name = (
            name.replace('prototypes0', 'prototypes')
            if one_prototype_head
            else f'prototypes.{name}'
        )
    return 'module.' + name


def _layout_of(names: Mapping[str, Any]) -> str:
    if any(name.startswith('_feature_blocks.') for name in names):
        return 'vissl'
    return 'swav' if any(_in_head(name) for name in names) else 'torchvision'


def _in_head(name: str) -> bool:
    return name.startswith(('projection_head', 'prototypes'))


# Tensors


def _flatten(params: Mapping, batch_stats: Mapping) -> dict[Key, Any]:
    return flatten_dict({'params': params, 'batch_stats': batch_stats})


def _to_torch_axes(key: Key, value: np.ndarray) -> np.ndarray:
    """(h, w, in, out) → (out, in, h, w); (in, out) → (out, in); weight norm's (K,) → (K, 1)."""
    if key[-1] == 'gain':
        value = value[:, None]
    elif key[-1] == 'kernel':
        value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
    return np.ascontiguousarray(value)


def _from_torch_axes(key: Key, value: np.ndarray) -> np.ndarray:
    if key[-1] == 'gain':
        value = value[:, 0]
    elif key[-1] == 'kernel':
        value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else (1, 0))
    return np.ascontiguousarray(value)


def _walk(content: Any, torch: Any, prefix: str = '') -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(content, torch.Tensor):
        half = content.dtype in (torch.bfloat16, torch.float16)
        yield prefix.removesuffix('.'), (content.float() if half else content).detach().numpy()
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _walk(value, torch, f'{prefix}{name}.')


def _nested(tensors: dict[str, Any]) -> dict[str, Any]:
    """VISSL's nesting: each of trunk and heads is one flat dict."""
    if not next(iter(tensors)).startswith(_VISSL):
        return tensors
    model = {
        part: {
            name.removeprefix(f'{_VISSL}{part}.'): value
            for name, value in tensors.items()
            if name.startswith(f'{_VISSL}{part}.')
        }
        for part in ('trunk', 'heads')
    }
    return {'classy_state_dict': {'base_model': {'model': model}}}


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "PyTorch weights need torch, which is not installed: pip install 'swav_jax[torch]'"
        ) from error
    return torch


# What the user reads


def _report(
    path: str | Path,
    tensors: Mapping[Key, Any],
    loaded: Mapping[Key, Any],
    problems: Mapping[str, list[str]],
    left_out: list[str],
) -> None:
    print(f'weights of {path}')
    for part in ('trunk', 'head'):
        covered, total = _coverage(tensors, loaded, part)
        kept = '' if covered == total else f'; {total - covered} keep the values they had'
        print(f'  {part}: {covered} of {total} tensors loaded{kept}')
    for kind, names in problems.items():
        for name in names:
            print(f'  {kind}: {name}')
    if left_out:
        print(f'  left out, no part of this model: {", ".join(left_out)}')


def _coverage(tensors: Mapping[Key, Any], loaded: Mapping[Key, Any], part: str) -> tuple[int, int]:
    covered, total = (sum(key[1] == part for key in keys) for keys in (loaded, tensors))
    return covered, total


def _check_trunk(
    path: str | Path,
    tensors: Mapping[Key, Any],
    loaded: Mapping[Key, Any],
    problems: Mapping[str, list[str]],
    allow_partial: bool,
) -> None:
    lists = []
    for kind, names in problems.items():
        if names := [name for name in names if not _in_head(name)]:
            more = f' and {len(names) - 3} more' if len(names) > 3 else ''
            lists.append(f'{len(names)} {kind}: {", ".join(names[:3])}{more}')
    covered, total = _coverage(tensors, loaded, 'trunk')
    if lists and not (covered and allow_partial):
        raise UserError(
            f'{path} is not of this trunk, it fills {covered} of its {total} tensors ('
            f'{"; ".join(lists)}): set config.model.trunk as it was when they were trained'
            + (', or allow a partial load' if covered else '')
        )
