"""SwAV with codes from a momentum encoder, as VISSL's `swav_momentum_loss` has it.

The encoder has the network's form. Its parameters follow the network's by an exponential moving
average, like in MoCo (He et al. 2020, arXiv 1911.05722); BatchNorm's running statistics are copied.
It sees the crops that get codes, and its embeddings fill the queue.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from swav_jax.methods.method import Batch, Learned, Network, Outputs
from swav_jax.methods.queue import Queue
from swav_jax.methods.swav import State, SwAV, normalize_prototypes, prediction_loss
from swav_jax.parallel.mesh import AXES, REPLICATED


class MomentumState(NamedTuple):
    """The method's state."""

    params: Any  # of the momentum encoder, in the form of the network's
    batch_stats: Any
    queue: Queue | None


class SwAVMomentum(SwAV):
    """SwAV with a momentum encoder; see `Method`."""

    def init(self, params: Any, batch_stats: Any, sizes: Any) -> tuple[Any, MomentumState]:
        """Return parameters with prototypes of length 1, their copy, and an empty queue."""
        params, state = super().init(params, batch_stats, sizes)
        return params, MomentumState(params, batch_stats, state.queue)

    def specs(self, state: MomentumState) -> MomentumState:
        """Split the queue like the batch."""
        whole = jax.tree.map(lambda _: REPLICATED, (state.params, state.batch_stats))
        return MomentumState(*whole, super().specs(State(state.queue)).queue)

    def before_step(
        self, step: jax.Array, params: Any, state: MomentumState, mesh: Mesh
    ) -> MomentumState:
        """Move the encoder towards the network: m · old + (1 - m) · new; a copy in step 0."""
        momentum = self._config.loss.momentum

        def follow(old, new):
            return jnp.where(step == 0, new, momentum * old + (1 - momentum) * new)

        return state._replace(params=jax.tree.map(follow, state.params, params))

    def loss(
        self, network: Network, params: Any, outputs: Outputs, batch: Batch, state: MomentumState
    ) -> Learned:
        """Compute the loss of the network's predictions of the encoder's codes."""
        chosen = self._encode(network, state.params, batch)
        codes, queue = self.codes(network, state.params, chosen, batch, state.queue)
        loss = prediction_loss(
            outputs.scores, codes, batch.weights, self._settings, axis_names=AXES
        )
        return Learned(loss, codes, MomentumState(state.params, batch.batch_stats, queue))

    def _encode(self, network: Network, params: Any, batch: Batch) -> Outputs:
        """The encoder's outputs of the crops that get codes."""
        crops = self._settings.crops_for_assign

        def encode(train):
            outputs, _ = network.forward(params, batch.batch_stats, crops, train)
            return lax.stop_gradient(outputs)

        evaluates_from = self._config.loss.momentum_eval_mode_iter_start
        if evaluates_from == 0:
            return encode(False)
        return lax.cond(batch.step < evaluates_from, lambda: encode(True), lambda: encode(False))

    def after_update(self, params: Any, state: Any) -> tuple[Any, Any]:
        """Scale the prototypes of both to length 1 (`config.loss.normalize_last_layer`)."""
        params, _ = super().after_update(params, State(None))
        if self._config.loss.normalize_last_layer and isinstance(state, MomentumState):
            state = state._replace(params=normalize_prototypes(state.params))
        return params, state

    def plan(self, sizes: Any) -> Iterator[tuple[str, str]]:
        """The momentum encoder, and the queue's length."""
        crops = len(self._settings.crops_for_assign)
        yield 'momentum encoder', f"of the network's size, without gradient, for {crops} crops"
        yield from super().plan(sizes)
