"""PyTorch's files of weights: .pth and .safetensors. Nothing that is read can run code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from swav_jax import files
from swav_jax.errors import UserError, printable
from swav_jax.torch_weights.layouts import VISSL

FORMATS = ('pth', 'safetensors')

_NUMPY = (
    *(f'numpy.{core}.multiarray.scalar' for core in ('core', '_core')),
    *(f'numpy.{core}.multiarray._reconstruct' for core in ('core', '_core')),
    *('numpy.dtype', 'numpy.ndarray'),
)


class _Skipped:
    """Takes the place of NumPy's numbers in a checkpoint.

    Unpickling them would not be safe, and only tensors are needed.
    """

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any):
        pass


def locate(path: str | Path) -> tuple[Path, str]:
    """The file or folder that FILE or FILE:PART names, and PART.

    Raises:
      UserError: there is none.
    """
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


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors in a file, by the keys that lead to each, joined by dots; half precision widened.

    Raises:
      UserError: it cannot be read, is damaged, or holds more than tensors and plain data, or none.
    """
    torch = _torch()
    try:
        with path.open('rb') as file:
            is_safetensors = file.read(9).endswith(b'{')  # its header's length, then JSON
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if is_safetensors or path.suffix == '.safetensors':
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with torch.serialization.safe_globals([(_Skipped, name) for name in _NUMPY]):
                content = torch.load(path, map_location='cpu', weights_only=True)
        tensors = _flat(content, torch)
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
    if not tensors:
        raise UserError(
            f'{printable(path)} holds no tensors: give a state dict as torch.save writes it'
        )
    return tensors


def _flat(content: Any, torch: Any) -> dict[str, np.ndarray]:
    found = {}
    for path, value in flatten_dict({'': content}).items():
        if isinstance(value, torch.Tensor):
            half = value.dtype in (torch.bfloat16, torch.float16)
            name = '.'.join(map(str, path[1:]))
            found[name] = (value.float() if half else value).detach().numpy()
    return found


def write(path: str | Path, state: Mapping[str, np.ndarray], file_format: str = 'pth') -> None:
    """Write a state dict of `to_torch`, whole or not at all.

    A .pth file in VISSL's layout is nested like VISSL's; a .safetensors file has flat names.

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
        with files.replacing(path) as temporary:
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


def _nested(tensors: dict[str, Any]) -> dict[str, Any]:
    """VISSL's nesting: each of trunk and heads is one flat dict."""
    if not next(iter(tensors)).startswith(VISSL):
        return tensors
    model = {'trunk': {}, 'heads': {}}
    for name, value in tensors.items():
        part, _, inner = name.removeprefix(VISSL).partition('.')
        model[part][inner] = value
    return {'classy_state_dict': {'base_model': {'model': model}}}


def _unreadable(path: str | Path, error: Exception) -> UserError:
    reason = getattr(error, 'strerror', None) or str(error)
    return UserError(
        f'{printable(path)} cannot be read ({printable(reason)}): give PyTorch weights or the '
        'folder of a run'
    )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "PyTorch weights need torch, which is not installed: pip install 'swav_jax[torch]'"
        ) from error
    return torch
