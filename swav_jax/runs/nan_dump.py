"""A dump of a step that is not finite, from which it can be inspected and replayed."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from swav_jax.errors import SaidElsewhereError, UserError, os_error_line
from swav_jax.models import SwAVNet
from swav_jax.parallel import distributed
from swav_jax.parallel.layout import Layout
from swav_jax.parallel.mesh import AXES, BATCH
from swav_jax.runs.checkpoint import Checkpoints
from swav_jax.state import TrainState
from swav_jax.step import begin, crops_of, objective

MOST_CROPPED = 64  # images whose crops are written; a replay cuts the others again


def write(
    workdir: Path,
    net: SwAVNet,
    config: ConfigDict,
    layout: Layout,
    state: TrainState,
    batch: dict[str, jax.Array],
    about: dict[str, Any],
) -> Path:
    """Write `nan_dump/` into the folder of the run and return its path; all processes call it.

    It holds about.json, which the checkpoint repeats; arrays.npz with `index` (B,), `weight` (B,),
    `embeddings` (V, B, D), for each head `scores0` (V, B, K) and `codes0` (A, B, K), and for each
    group `crops0` (n, 64, S, S, channels); and state/, a checkpoint of the state before the step.

    Args:
      workdir: the run's folder.
      net, config, layout: as in `step.make_train_step`.
      state: after the step, which changed nothing but `failed`.
      batch: of the step, on the mesh.
      about: what a replay needs to know.

    Raises:
      UserError: it cannot be written.
    """
    folder = workdir / 'nan_dump'
    whole = layout.gather(state)
    whole = whole.replace(failed=jax.jit(jnp.logical_not)(whole.failed))  # as it was before
    arrays = {'index': batch['index'], 'weight': batch['weight']}
    arrays |= jax.jit(functools.partial(_look, net, config, layout))(state, batch)
    arrays = {name: _plain(_everywhere(x)) for name, x in arrays.items()}
    try:
        with distributed.failing_together():
            if jax.process_index() == 0:
                _write_arrays(folder, arrays, about)
        checkpoints = Checkpoints(folder / 'state')
        checkpoints.save(about['step'] - 1, whole, about)
        checkpoints.close()
    except SaidElsewhereError:
        raise
    except (OSError, UserError) as error:
        reason = os_error_line(error) if isinstance(error, OSError) else str(error)
        raise UserError(
            f'step {about["step"]:,} is not finite, and its dump cannot be written: {reason}'
        ) from error
    return folder


def _write_arrays(folder: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / 'arrays.npz'
    try:
        np.savez(path, **arrays)
        path = folder / 'about.json'
        path.write_text(json.dumps(about, indent=2) + '\n')
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _look(
    net: SwAVNet, config: ConfigDict, layout: Layout, state: TrainState, batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Crops, outputs and codes of the step."""

    def look(state, batch):
        found = objective(
            net,
            config,
            layout.own(state.params),
            state,
            batch,
            batch['weight'],
            batch['index'],
        )
        return (
            {'embeddings': found.outputs.embeddings}
            | {f'scores{i}': x for i, x in enumerate(found.outputs.scores)}
            | {f'codes{i}': x for i, x in enumerate(found.learned.codes)}
        )

    found = jax.shard_map(
        look,
        mesh=layout.mesh,
        in_specs=(layout.specs.replace(opt_state=None), BATCH),
        out_specs=P(None, AXES),
    )(begin(config, layout, state), batch)
    first = {name: x[:MOST_CROPPED] for name, x in batch.items()}
    return found | {f'crops{i}': x for i, x in enumerate(crops_of(config, first))}


def _everywhere(x: jax.Array) -> np.ndarray:
    """The whole array, in every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _plain(x: np.ndarray) -> np.ndarray:
    """Convert bfloat16, which NumPy's files do not have, to float32."""
    return x.astype(np.float32) if x.dtype == jnp.bfloat16 else x
