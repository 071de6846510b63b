"""The encoders of a run in its checkpoints: the network, and a method's momentum encoder."""

from typing import Any

from swav_jax.errors import UserError

# What to read of a checkpoint, see `Checkpoints.read`; most runs have no more than the network.
ENCODERS = ('params', 'batch_stats', 'method/params', 'method/batch_stats')


def variables(found: dict[str, Any], encoder: str) -> dict[str, Any]:
    """`params` and `batch_stats` of one encoder.

    Args:
      found: what a checkpoint holds of `ENCODERS`.
      encoder: 'network' or 'momentum'.

    Raises:
      UserError: the run has no momentum encoder.
    """
    if encoder == 'network':
        return {kind: found[kind] for kind in ('params', 'batch_stats') if kind in found}
    if 'method' not in found:
        raise UserError('this run has no momentum encoder: config.method=swav_momentum makes one')
    return found['method']
