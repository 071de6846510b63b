"""Finds a model's tensors in a checkpoint, and removes what their names are prefixed with."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swav_jax import models
from swav_jax.errors import UserError, printable
from swav_jax.torch_weights.layouts import VISSL

# Prefixes of a model's names in a checkpoint. If one is found, names without it belong to
# optimizers and the like. Any other prefix of a trunk is found by the names of its blocks.
_WRAPPERS = (VISSL, 'base_model.model.', 'state_dict.', 'model.', 'module.', '_orig_mod.')
_COMPILED = re.compile(r'(^|(?<=\.))_orig_mod\.')  # of modules that torch.compile compiled


def unwrapped(tensors: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """A model's tensors, by their names without the prefixes of the checkpoint.

    Args:
      tensors: by their names.
      path: of the file, for the error message.

    Raises:
      UserError: there are several trunks, each with its own prefix.
    """
    tensors = dict(tensors)
    while prefix := next((p for p in _WRAPPERS if any(n.startswith(p) for n in tensors)), None):
        tensors = _without(prefix, tensors)
    tensors = {_COMPILED.sub('', name): value for name, value in tensors.items()}
    blocks = '|'.join(trunk.torch_blocks for trunk in models.TRUNKS.values())
    trunk = re.compile(rf'((?:[^.]+\.)*?)(?:trunk\.)?(?:_feature_blocks\.)?(?:{blocks})\.')
    found = {match[1] for name in tensors if (match := trunk.match(name))}
    if len(found) > 1 and '' not in found:
        raise UserError(
            f'{printable(path)} holds several trunks, {_listed(found)}: name one, as '
            f'{printable(path)}:{printable(min(found).removesuffix("."))}'
        )
    return _without(*found, tensors) if len(found) == 1 else tensors


def of_part(path: Path, part: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors below `part`, by the rest of their names.

    Raises:
      UserError: there are none.
    """
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
