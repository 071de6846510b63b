"""What a step takes of one device: memory, FLOPs, bytes sent."""

import dataclasses

import jax
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from swav_jax import config as settings
from swav_jax import optim
from swav_jax.commands import traced
from swav_jax.state import TrainState, make_state
from swav_jax.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Cost:
    """One device's share of a step, in bytes except `flops` and `num_params`."""

    params: int
    num_params: int
    opt_state: int
    gradients: int  # with micro-batches two: the sum, and that of one
    gathered: int  # the whole parameters, if each device keeps only a slice
    kept: int  # of a micro-batch's forward pass, for its backward pass
    outputs: int  # of all micro-batches, and their gradients
    canvases: int  # of all micro-batches
    crops: int  # of one
    method: dict[str, int]  # its state, by part
    sent: int  # all-reduced, gathered or scattered
    flops: int
    flops_again: int  # of these, what micro-batches compute a second time

    @property
    def repeated(self) -> float:
        """By how much micro-batches multiply the FLOPs of a batch at once."""
        return self.flops / (self.flops - self.flops_again)

    @property
    def memory(self) -> int:
        """The sum, without the scratch memory of kernels."""
        parts = (self.params, self.opt_state, self.gradients, self.gathered, self.kept)
        batch = (self.outputs, self.canvases, self.crops)
        return sum(parts) + sum(batch) + sum(self.method.values())


def cost(
    config: ConfigDict, sizes: settings.Sizes, schedule: optim.Schedule, mesh: AbstractMesh
) -> Cost:
    """Count one device's share of a step, from the traced step and the state's layout."""
    made = {}

    def initial() -> TrainState:
        made['net'], made['tx'], made['layout'], state = make_state(config, sizes, schedule, mesh)
        return state

    state = jax.eval_shape(initial)
    layout = made['layout']
    step = make_train_step(made['net'], made['tx'], config, layout)
    batch = traced.batch_shapes(config, sizes.batch_size)
    counted = traced.cost(step, state, batch)
    whole = layout.whole()
    shardings, sliced = layout.shardings, config.sharding == 'zero' and mesh.size > 1
    pixels = sum(
        n * size**2 for n, size in zip(config.data.num_crops, config.data.size_crops, strict=True)
    )
    rows, turns = config.data.batchsize_per_replica, config.train.micro_batches
    return Cost(
        params=traced.share_bytes(state.params, shardings.params),
        num_params=sum(x.size for x in jax.tree.leaves(whole.params)),
        opt_state=traced.share_bytes(state.opt_state, shardings.opt_state),
        gradients=traced.tree_bytes(whole.params) * min(turns, 2),
        gathered=traced.tree_bytes(whole.params) if sliced else 0,
        kept=traced.kept_bytes(config),
        outputs=output_bytes(config),
        canvases=traced.tree_bytes(batch) // mesh.size,
        crops=4 * rows * config.data.channels * pixels,
        method={
            name: traced.share_bytes(part, getattr(shardings.method, name))
            for name, part in state.method._asdict().items()
        },
        sent=counted['bytes_sent'],
        flops=counted['flops'],
        flops_again=turns * traced.forward_flops(config) if turns > 1 else 0,
    )


def output_bytes(config: ConfigDict) -> int:
    """Bytes of a device's embeddings and scores, and of their gradients.

    Without micro-batches they are among what the forward pass keeps.
    """
    turns, head = config.train.micro_batches, config.model.head
    if turns == 1:
        return 0
    rows = turns * config.data.batchsize_per_replica * sum(config.data.num_crops)
    return 2 * 4 * rows * (head.dims[-1] + sum(head.num_clusters))
