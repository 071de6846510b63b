"""Resuming a run: what a checkpoint records of it, and why a resume is refused."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import swav_jax
from swav_jax import config as settings
from swav_jax import methods
from swav_jax.data.images import Source
from swav_jax.errors import UserError
from swav_jax.parallel.layout import Layout
from swav_jax.runs.checkpoint import Checkpoints
from swav_jax.state import TrainState

# A change of these, or of what `Method.fixed` names, gives the arrays of a state another meaning
# (model, optimizer and its schedule), makes step n read other images (order, crops), or comes too
# late to matter (first weights). The rest may change: loss, distortions, precision, length, logs,
# checkpoints, evaluation, and the batch of a device as long as the global batch stays.
FIXED = (
    'global_batch', 'seed', 'method', 'init_from', 'init_allow_partial', 'data', 'model',
    'optimizer', 'train.per_crop_pass',
)  # fmt: skip
FREE = ('data.batchsize_per_replica', 'data.max_bad_fraction', 'model.remat', 'model.sync_bn')
AT_START = ('init_from', 'init_allow_partial')  # used at the first start only, also with --force
# Results of evaluations with other values are not comparable with later ones.
MEASURED_WITH = (
    'evaluate.train_source', 'evaluate.test_source', 'evaluate.k', 'evaluate.temperature',
    'evaluate.size', 'evaluate.resize', 'evaluate.feature_grid', 'evaluate.encoder',
)  # fmt: skip


def describe(
    config: ConfigDict, global_batch: int, group_images: int, source: Source
) -> dict[str, Any]:
    """Return what a checkpoint records of its run.

    Args:
      config: its settings.
      global_batch: images of a step.
      group_images: images of a BatchNorm group.
      source: the images.
    """
    return {
        'config': settings.to_dict(config),
        'version': swav_jax.__version__,
        'global_batch': global_batch,
        'group_images': group_images,
        'images': {'count': len(source), 'digest': source.digest()},
    }


@dataclass(frozen=True)
class Restored:
    """A run that is resumed."""

    state: TrainState  # split over the mesh
    notes: dict[str, Any]  # see `read_notes`
    config: ConfigDict  # the settings; of those `AT_START` the first start's
    written: ConfigDict  # for config.json; if no step is left, only those of evaluations are new
    said: list[str]  # lines for the user


def check_config(now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse to resume with settings or data that do not fit a checkpoint.

    Args:
      now: of this run, from `describe`.
      saved: the checkpoint's metadata.

    Raises:
      UserError: naming each setting that differs, with its old and its new value.
    """
    fixed = FIXED + methods.make(ConfigDict(now['config'])).fixed
    changed = [
        f'{"" if name == "global_batch" else "config."}{name} {old!r} → {new!r}'
        for name, old, new in _changes(now, saved, fixed)
        if not _is(name, FREE)
    ]
    if 'images' in saved and not _changes(now, saved, ('data.source', 'data.limit')):
        old, new = saved['images'], now['images']
        where = f'images of config.data.source={now["config"]["data"]["source"]}'
        if old['count'] != new['count']:
            changed.append(f'{where} {old["count"]:,} → {new["count"]:,}')
        elif old['digest'] != new['digest']:
            changed.append(f'{where} are {new["count"]:,} others, or in another order')
    if changed:
        raise UserError(
            f'the run in this --workdir was made with other settings ({", ".join(changed)}): use '
            'those, name another --workdir, or resume anyway with --force'
        )


def read_notes(now: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint holds beside the state, and a run changes.

    Results of evaluations with other images or settings than those of `now` are left out.

    Returns:
      results: of the evaluations; evaluated: whether the one that is due at this step is among
      them; left_out: (first, last) of each range of skipped batches.

    Raises:
      KeyError, TypeError, ValueError: the metadata is damaged.
    """
    left_out = [[int(first), int(last)] for first, last in saved['left_out']]
    results = {str(name): float(value) for name, value in saved['results'].items()}
    if _changes(now, saved, MEASURED_WITH):
        return {'results': {}, 'evaluated': False, 'left_out': left_out}
    return {'results': results, 'evaluated': bool(saved['evaluated']), 'left_out': left_out}


def restore(
    checkpoints: Checkpoints,
    layout: Layout,
    config: ConfigDict,
    now: Mapping[str, Any],
    last_step: int,
    force: bool,
) -> Restored | None:
    """Return the run of the newest sound checkpoint, or None without any checkpoint.

    Args:
      checkpoints, layout, config, last_step: of the run.
      now: of this start, from `describe`.
      force: resume also with other settings or data.

    Raises:
      UserError: settings or data do not fit.
    """
    notes = {}

    def accept(saved: dict[str, Any]) -> None:
        notes.update(read_notes(now, saved))
        if not force:
            check_config(now, saved)

    found = checkpoints.restore(layout.whole(), accept)
    if found is None:
        return None
    state, saved = layout.spread(found[0]), found[1]
    step, said = int(state.step), []
    if saved['results'] and not notes['results']:
        said.append('figures that were found with other settings under config.evaluate are dropped')
    then = saved.get('group_images', now['group_images'])  # runs of earlier versions lack it
    if then != now['group_images']:
        said.append(
            f'a BatchNorm group has {now["group_images"]} images, {then} before, so losses differ: '
            'it is config.model.sync_bn.group_size × config.data.batchsize_per_replica'
        )
    used = copy.deepcopy(config)
    for name in AT_START:
        used[name] = saved['config'].get(name, config[name])
        if used[name] != config[name]:
            said.append(f'config.{name}={config[name]!r} is not used: the run has begun without it')
    written = used
    if step >= last_step:
        said.append(
            f'nothing is left to train: the run has made {step:,} steps of {last_step:,} '
            '(config.train.max_steps, config.optimizer.num_epochs)'
        )
        written = ConfigDict(dict(saved['config']) | {'evaluate': config.evaluate})
    return Restored(state, notes, used, written, said)


def _changes(
    now: Mapping[str, Any], saved: Mapping[str, Any], among: tuple[str, ...]
) -> list[tuple[str, Any, Any]]:
    """Name, old and new value of each setting that is in both and differs."""
    new = flatten_dict(now['config'] | {'global_batch': now['global_batch']}, sep='.')
    old = flatten_dict(saved['config'] | {'global_batch': saved['global_batch']}, sep='.')
    return [
        (name, old[name], new[name])
        for name in new
        if name in old and old[name] != new[name] and _is(name, among)
    ]


def _is(name: str, of: tuple[str, ...]) -> bool:
    return any(name == path or name.startswith(f'{path}.') for path in of)
