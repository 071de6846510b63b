"""PyTorch weights in and out, in the layouts of torchvision, VISSL and facebookresearch/swav.

Reading finds the layout by the names in the file. Nothing that is read can run code: only tensors
and plain data are unpickled.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from swav_jax import atomic
from swav_jax.errors import UserError
from swav_jax.terminal import printable
from swav_jax.torch_weights.layouts import (
    LAYOUTS,
    VISSL,
    Key,
    flatten,
    from_torch_axes,
    in_head,
    inner_name,
    inner_names,
    layout_of,
    outer_name,
    projection_layers,
    sequential_places,
    to_torch_axes,
)

FORMATS = ('pth', 'safetensors')

# What stands before the model's own names in a checkpoint. Where one is found, all names without
# it are those of optimizers and the like. Any other prefix that holds a trunk is found by _TRUNK.
_WRAPPERS = (VISSL, 'base_model.model.', 'state_dict.', 'model.', 'module.', '_orig_mod.')
_COMPILED = re.compile(r'(^|(?<=\.))_orig_mod\.')  # torch.compile puts it before what it compiled
_TRUNK = re.compile(
    r'((?:[^.]+\.)*?)(?:trunk\.)?(?:_feature_blocks\.)?(?:layer\d+\.\d+|trunk_output|res\d+)\.'
)
_NUMPY = (
    *(f'numpy.{core}.multiarray.scalar' for core in ('core', '_core')),
    *(f'numpy.{core}.multiarray._reconstruct' for core in ('core', '_core')),
    *('numpy.dtype', 'numpy.ndarray'),
)
_CLASSIFIERS = re.compile(r'(fc|clf|classifier)\.')


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
    tensors = flatten(params, batch_stats)
    layers = projection_layers(tensors)
    names = inner_names(tensors, layout, sequential_places(layers, activation))
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
    params: Mapping, batch_stats: Mapping, path: str | Path, *, allow_partial: bool | None = None
) -> tuple[dict, dict]:
    """The variables with the values of PyTorch weights, or of another run, where these have them.

    Prints what was loaded. A head that the file does not have, or has in other shapes, keeps its
    values; so do trunk tensors with `allow_partial`.

    Args:
      params, batch_stats: of a `SwAVNet`; values are converted to their dtypes.
      path: see `read`.
      allow_partial: load what fits of a file that is not of this trunk; None: never, and no error
        advises it.

    Raises:
      UserError: the file cannot be read, is not of this trunk, nothing of it fits, or a tensor
        that fits holds something other than finite real numbers.
    """
    found = read(path)
    tensors = flatten(params, batch_stats)
    places = sorted({int(i) for n in found for i in re.findall(r'^projection_head\.(\d+)\.', n)})
    names = inner_names(tensors, layout_of(found), places)

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
    variables = unflatten_dict(tensors | loaded)
    return variables['params'], variables.get('batch_stats', {})


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The model's tensors in a file, by their names without what wraps the model there.

    Args:
      path: a `.safetensors` file, what torch.save wrote, or the folder of a run, of which the
        newest checkpoint is read. Of a file with several models `FILE:student` names one by what
        its tensors' names begin with.

    Raises:
      UserError: there is no such file, it is damaged, it holds more than tensors and plain data
        (which is not unpickled), it holds no tensors, or several trunks.
    """
    path, part = _file_and_part(path)
    if path.is_dir():
        return _read_run(path)
    tensors = _read_file(path, _torch())
    if not tensors:
        raise UserError(
            f'{printable(path)} holds no tensors: give a state dict as torch.save writes it'
        )
    if part:
        tensors = _of_part(path, part, tensors)
    return {inner_name(name): value for name, value in unwrapped(tensors, path).items()}


def unwrapped(tensors: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """A model's tensors without what stands before all of their names; `path` is for the line.

    Raises:
      UserError: several trunks have a name before theirs.
    """
    tensors = dict(tensors)
    while prefix := next((p for p in _WRAPPERS if any(n.startswith(p) for n in tensors)), None):
        tensors = _without(prefix, tensors)
    tensors = {_COMPILED.sub('', name): value for name, value in tensors.items()}
    found = {match[1] for name in tensors if (match := _TRUNK.match(name))}
    if len(found) > 1 and '' not in found:
        raise UserError(
            f'{printable(path)} holds several trunks, {_listed(found)}: name one, as '
            f'{printable(path)}:{printable(min(found).removesuffix("."))}'
        )
    return _without(*found, tensors) if len(found) == 1 else tensors


def _file_and_part(path: str | Path) -> tuple[Path, str]:
    """What is there of FILE or FILE:PART, and PART."""
    try:
        given = Path(path).expanduser()
        if given.is_dir() or given.is_file():
            return given, ''
        file, _, part = str(given).rpartition(':')
        if file and part and Path(file).is_file():
            return Path(file), part
        there = given.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no permission, too long, no such user
        raise _unreadable(path, error) from error
    what = 'is neither a file nor a folder' if there else 'does not exist'
    raise UserError(f'{printable(path)} {what}: give PyTorch weights or the folder of a run')


def _of_part(path: Path, part: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors whose names have `part` as a run of whole names, from there on."""
    place = re.compile(rf'(?:[^.]+\.)*?{re.escape(part)}\.')
    found = {n[m.end() :]: t for n, t in tensors.items() if (m := place.match(n))}
    if not found:
        begin = {name.partition('.')[0] for name in tensors}
        raise UserError(
            f'{printable(path)} has no tensors of {printable(part)!r}; their names begin with '
            f'{_listed(begin)}'
        )
    return found


def _without(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _listed(names: Iterable[str]) -> str:
    names = sorted(printable(name) for name in names)
    return ', '.join(names[:8]) + (f' and {len(names) - 8} more' if len(names) > 8 else '')


def _unreadable(path: str | Path, error: Exception) -> UserError:
    reason = getattr(error, 'strerror', None) or str(error)
    return UserError(
        f'{printable(path)} cannot be read ({printable(reason)}): give PyTorch weights or the '
        'folder of a run'
    )


def write(path: str | Path, state: Mapping[str, np.ndarray], file_format: str = 'pth') -> None:
    """Writes a state dict of `to_torch`, whole or not at all.

    VISSL's is nested in a .pth as VISSL nests it; a .safetensors file keeps the flat names.

    Raises:
      UserError: the format is unknown, or the file cannot be written.
    """
    if file_format not in FORMATS:
        raise UserError(f'format is {file_format!r}: choose one of {", ".join(FORMATS)}')
    torch = _torch()
    tensors = {name: torch.from_numpy(value.copy()) for name, value in state.items()}
    try:
        path = Path(path).expanduser()
        if path.exists() and not path.is_file():  # a folder, or a device that would be replaced
            raise UserError(f'--out={printable(path)} cannot be written (not a file): give another')
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as temporary:
            if file_format == 'safetensors':
                from safetensors.torch import save

                temporary.write_bytes(save(tensors))
            else:
                torch.save(_nested(tensors), temporary)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, 'strerror', None) or str(error).partition('\n')[0]
        raise UserError(
            f'--out={printable(path)} cannot be written ({printable(reason)}): give another'
        ) from error


# Files


def _read_run(workdir: Path) -> dict[str, np.ndarray]:
    from swav_jax.runs.checkpoint import Checkpoints

    if not (workdir / 'checkpoints').is_dir():
        raise UserError(
            f'{printable(workdir)} does not hold checkpoints: give PyTorch weights or the '
            'folder of a run'
        )
    with contextlib.closing(Checkpoints(workdir / 'checkpoints')) as checkpoints:
        _, variables, _ = checkpoints.read(('params', 'batch_stats'))
    tensors = flatten(**variables)
    names = inner_names(
        tensors, 'swav', sequential_places(projection_layers(tensors), activation=True)
    )
    return {names[key]: to_torch_axes(key, np.asarray(value)) for key, value in tensors.items()}


class _Skipped:
    """What stands in for NumPy's numbers that checkpoints hold beside their tensors.

    Making real ones of foreign bytes would not be safe, and none is needed.
    """

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any):
        pass


def _read_file(path: Path, torch: Any) -> dict[str, np.ndarray]:
    try:
        with path.open('rb') as file:
            is_safetensors = file.read(9).endswith(b'{')  # its header's length, then JSON
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if is_safetensors or path.suffix == '.safetensors':
            from safetensors.torch import load_file

            return _tensors(load_file(path), torch)
        with torch.serialization.safe_globals([(_Skipped, name) for name in _NUMPY]):
            content = torch.load(path, map_location='cpu', weights_only=True)
        return _tensors(content, torch)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        if 'unsupported global' in str(error).lower():
            raise UserError(
                f'{printable(path)} holds Python objects, whose unpickling can run code, so '
                'nothing of it was loaded: save its tensors alone, '
                'torch.save(model.state_dict(), …)'
            ) from error
        reason = printable(str(error).strip().partition('\n')[0][:100])
        raise UserError(
            f'{printable(path)} is damaged or not of PyTorch ({reason}): fetch it again'
        ) from error


def _tensors(content: Any, torch: Any) -> dict[str, np.ndarray]:
    """All tensors in nested dicts, by the keys that lead to each."""
    found = {}
    for path, value in flatten_dict({'': content}).items():
        if isinstance(value, torch.Tensor):
            half = value.dtype in (torch.bfloat16, torch.float16)
            name = '.'.join(map(str, path[1:]))
            found[name] = (value.float() if half else value).detach().numpy()
    return found


def _nested(tensors: dict[str, Any]) -> dict[str, Any]:
    """VISSL's nesting: each of trunk and heads is one flat dict."""
    if not next(iter(tensors)).startswith(VISSL):
        return tensors
    model = {
        part: {
            name.removeprefix(f'{VISSL}{part}.'): value
            for name, value in tensors.items()
            if name.startswith(f'{VISSL}{part}.')
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
