"""SwAV: the swapped prediction loss, the prototypes, and the method.

Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
(arXiv 2006.09882), as VISSL computes it. Letters: V crops of B images, A of them assigned to codes,
K prototypes, D dimensions, H prototype heads.

Every function gets one device's share of the batch. `axis_names` are the mesh axes over which sums
include the other devices; `()` is a single device.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from swav_jax.errors import UserError, refusal
from swav_jax.methods.health import health, sign_of_collapse
from swav_jax.methods.method import Batch, Learned, Method, Network, Outputs
from swav_jax.methods.queue import Queue
from swav_jax.methods.sinkhorn import harden, sinkhorn_codes
from swav_jax.parallel.mesh import AXES, REPLICATED
from swav_jax.precision import need_float64


def swapped_prediction(
    scores: Float[Array, 'crops images prototypes'],
    codes: Float[Array, 'assign images prototypes'],
    *,
    crops_for_assign: Sequence[int],
    temperature: float,
) -> Float[Array, ' images']:
    """Cross entropy between an image's codes and the predictions of its other crops.

    Paper, equations 1 and 2: the mean, over assigned crops a and over the crops v other than a, of
    -sum_k code[a, k] · log softmax(scores[v] / temperature)[k].

    Args:
      scores: (V, B, K) products of embeddings and prototypes, which get the gradient.
      codes: (A, B, K) codes of the crops named in `crops_for_assign`, in that order.
      crops_for_assign: A different indices of crops.
      temperature: of the softmax, > 0.

    Returns:
      (B,) the loss of each image.
    """
    log_p = jax.nn.log_softmax(scores / temperature)
    log_p_others = jnp.sum(log_p, 0) - log_p[jnp.asarray(crops_for_assign)]
    num_pairs = len(crops_for_assign) * (scores.shape[0] - 1)
    return -jnp.sum(codes * log_p_others, axis=(0, 2)) / num_pairs


@dataclasses.dataclass(frozen=True)
class SwAVSettings:
    """Settings of `swav_loss`, with the names of `config.loss`."""

    crops_for_assign: tuple[int, ...] = (0, 1)  # the A crops that get codes
    temperature: float = 0.1  # see `swapped_prediction`
    epsilon: float = 0.05  # this and the next two: see `sinkhorn_codes`
    num_iters: int = 3
    shk_powerlaw: float = 0.0
    use_double_precision: bool = False  # codes and loss in float64 (needs jax_enable_x64)


def swav_codes(
    samples: Sequence[Float[Array, 'assign images _']],
    queue_scores: Sequence[Float[Array, 'assign batches images _']] | None,
    queue: Queue | None,
    weights: Float[Array, ' images'],
    settings: SwAVSettings,
    *,
    hard_assignment: bool | Bool[Array, ''] = False,
    axis_names: Sequence[str] = (),
) -> list[Float[Array, 'assign images _']]:
    """Codes of this device's images, from their scores and those of the queue.

    Args:
      samples: for each head, (A, B, K_h) scores of the crops that get codes.
      queue_scores, queue, weights, settings, hard_assignment, axis_names: as in `swav_loss`.

    Returns:
      For each head (A, B, K_h).
    """
    if settings.use_double_precision:
        samples = [s.astype(jnp.float64) for s in samples]
    num_images, sample_weights = len(weights), weights
    if queue is not None:
        dtype = samples[0].dtype
        old = [q.reshape(len(q), -1, q.shape[-1]).astype(dtype) for q in queue_scores]
        samples = [jnp.concatenate(pair, axis=1) for pair in zip(samples, old, strict=True)]
        sample_weights = jnp.append(weights, jnp.where(queue.is_full(), queue.weights, 0.0))
    codes = sinkhorn_codes(
        samples,
        epsilon=settings.epsilon,
        num_iters=settings.num_iters,
        weights=sample_weights,
        powerlaw=settings.shk_powerlaw,
        axis_names=axis_names,
    )
    codes = [c[:, :num_images] for c in codes]
    return [jnp.where(hard_assignment, harden(c), c) for c in codes]


def prediction_loss(
    scores: Sequence[Float[Array, 'crops images _']],
    codes: Sequence[Float[Array, 'assign images _']],
    weights: Float[Array, ' images'],
    settings: SwAVSettings,
    *,
    axis_names: Sequence[str] = (),
) -> Float[Array, '']:
    """`swapped_prediction`, averaged over the heads and the images of weight 1.

    The arguments are those of `swav_loss`, with its codes.
    """
    losses = [
        swapped_prediction(
            s.astype(c.dtype),
            c,
            crops_for_assign=settings.crops_for_assign,
            temperature=settings.temperature,
        )
        for s, c in zip(scores, codes, strict=True)
    ]
    # The mean over the mesh leaves out images of weight 0, on whichever device they are.
    mean_weight = lax.pmean(jnp.mean(weights), axis_names)
    return jnp.mean(weights * sum(losses) / len(losses)) / jnp.maximum(mean_weight, 1e-12)


def swav_loss(
    scores: Sequence[Float[Array, 'crops images _']],
    queue_scores: Sequence[Float[Array, 'assign batches images _']] | None,
    queue: Queue | None,
    weights: Float[Array, ' images'],
    settings: SwAVSettings,
    *,
    hard_assignment: bool | Bool[Array, ''] = False,
    axis_names: Sequence[str] = (),
) -> tuple[Float[Array, ''], list[Float[Array, 'assign images _']]]:
    """This device's SwAV loss; the mean over devices is the loss of the global batch.

    Args:
      scores: for each head, (V, B, K_h).
      queue_scores: for each head, (A, S, B, K_h) scores of the queue with the current prototypes.
      queue: the queue, for its weights; it is used once it is full.
      weights: (B,) 1, or 0 for an image that must not count.
      settings: of the loss.
      hard_assignment: whether codes are rounded to one-hot codes.
      axis_names: mesh axes over which the batch is split.

    Returns:
      The loss, and for each head the (A, B, K_h) codes of this device's images.
    """
    samples = [s[jnp.asarray(settings.crops_for_assign)] for s in scores]
    codes = swav_codes(
        samples,
        queue_scores,
        queue,
        weights,
        settings,
        hard_assignment=hard_assignment,
        axis_names=axis_names,
    )
    return prediction_loss(scores, codes, weights, settings, axis_names=axis_names), codes


def normalize_prototypes(params: dict) -> dict:
    """The parameters with every prototype (a column of (D, K_h)) scaled to length 1.

    `normalize_last_layer`: done before the first step and after every update, also while prototypes
    are frozen. Length 0 stays 0, as in torch.nn.functional.normalize.
    """
    head = dict(params['head'])
    for name in head:
        if name.startswith('prototypes'):
            kernel = head[name]['kernel']
            length = jnp.linalg.norm(kernel, axis=0, keepdims=True)
            head[name] = {**head[name], 'kernel': kernel / jnp.maximum(length, 1e-12)}
    return {**params, 'head': head}


class State(NamedTuple):
    """SwAV's state."""

    queue: Queue | None


class SwAV(Method):
    """SwAV with a run's settings; see `Method`."""

    fixed = (
        'loss.crops_for_assign',
        'loss.queue',
        'loss.normalize_last_layer',
        'loss.temp_hard_assignment_iters',
    )

    def __init__(self, config: Any):
        self._config, loss = config, config.loss
        self._settings = SwAVSettings(
            crops_for_assign=tuple(loss.crops_for_assign),
            temperature=loss.temperature,
            epsilon=loss.epsilon,
            num_iters=loss.num_iters,
            shk_powerlaw=loss.shk_powerlaw,
            use_double_precision=loss.use_double_precision,
        )
        self.remedy = (
            f'Lower config.loss.epsilon={loss.epsilon} (as {min(0.03, loss.epsilon / 2):g}), '
            'freeze the prototypes for longer (config.model.temp_frozen_params_iter_map), lower '
            'the learning rate (config.optimizer.param_schedulers.lr)'
        )

    def check(self) -> None:
        """Refuse a single crop, and codes of crops that do not exist."""
        counts, assigned = self._config.data.num_crops, self._settings.crops_for_assign
        total = sum(counts)
        if total < 2:
            raise UserError(
                f'config.data.num_crops={tuple(counts)} makes one crop: SwAV predicts codes of a '
                'crop from another one, use at least 2'
            )
        if (
            not assigned
            or len(set(assigned)) < len(assigned)
            or not set(assigned) <= set(range(total))
        ):
            raise refusal(
                'config.loss.crops_for_assign',
                assigned,
                f'different indices of the {total} crops, from 0 to {total - 1}, at least one',
            )

    def check_run(self, sizes: Any) -> None:
        """Refuse a queue of less than a batch, and float64 where JAX has it disabled."""
        length = self._config.loss.queue.queue_length
        if 0 < length < sizes.batch_size:
            raise UserError(
                f'config.loss.queue.queue_length={length} is less than the global batch of '
                f'{sizes.batch_size}: use a multiple of it, or 0 for no queue'
            )
        if self._settings.use_double_precision:
            need_float64('loss.use_double_precision')

    def queue_batches(self, sizes: Any) -> int:
        """Number of global batches in the queue, rounded down."""
        return self._config.loss.queue.queue_length // sizes.batch_size

    def init(self, params: Any, batch_stats: Any, sizes: Any) -> tuple[Any, State]:
        """Return parameters with prototypes of length 1, and an empty queue."""
        return self.after_update(params, State(self.empty_queue(params, sizes)))

    def empty_queue(self, params: Any, sizes: Any) -> Queue | None:
        """Return the queue before the first step, None without one."""
        batches = self.queue_batches(sizes)
        if not batches:
            return None
        kernel = params['head']['prototypes0']['kernel']
        assigned = len(self._settings.crops_for_assign)
        return Queue.empty(assigned, batches, sizes.batch_size, kernel.shape[0], kernel.dtype)

    def specs(self, state: State) -> State:
        """Split the queue like the batch."""
        split = Queue(P(None, None, AXES), P(None, AXES), REPLICATED)
        return State(None if state.queue is None else split)

    def loss(
        self, network: Network, params: Any, outputs: Outputs, batch: Batch, state: State
    ) -> Learned:
        """Compute `swav_loss`, and push the embeddings of the crops with codes into the queue."""
        codes, queue = self.codes(
            network, lax.stop_gradient(params), self._chosen(outputs), batch, state.queue
        )
        loss = prediction_loss(
            outputs.scores, codes, batch.weights, self._settings, axis_names=AXES
        )
        return Learned(loss, codes, State(queue))

    def codes(
        self, network: Network, params: Any, chosen: Outputs, batch: Batch, queue: Queue | None
    ) -> tuple[list[jax.Array], Queue | None]:
        """Return the codes of the crops that get some, and the queue with their embeddings.

        Args:
          network: its functions.
          params: without gradient, of the prototypes that give the codes.
          chosen: outputs of these crops alone.
          batch: this device's.
          queue: this device's share.
        """
        queue_scores = None
        if queue is not None:
            queue_scores = network.score(params, queue.embeddings)
        codes = swav_codes(
            chosen.scores,
            queue_scores,
            queue,
            batch.weights,
            self._settings,
            hard_assignment=batch.step < self._config.loss.temp_hard_assignment_iters,
            axis_names=AXES,
        )
        if queue is not None:
            embeddings = lax.stop_gradient(chosen.embeddings)
            pushed = queue.push(embeddings.astype(queue.embeddings.dtype), batch.weights)
            fills = batch.step >= self._config.loss.queue.start_iter
            queue = jax.tree.map(lambda new, old: jnp.where(fills, new, old), pushed, queue)
        return codes, queue

    def health(
        self, outputs: Outputs, learned: Learned, weights: jax.Array
    ) -> dict[str, jax.Array]:
        """Compute `health.health` of the crops that get codes and the first prototype head."""
        chosen = self._chosen(outputs)
        return health(learned.loss, chosen.embeddings, chosen.scores[0], learned.codes[0], weights)

    def _chosen(self, outputs: Outputs) -> Outputs:
        """The outputs of the crops that get codes."""
        return jax.tree.map(lambda x: x[jnp.asarray(self._settings.crops_for_assign)], outputs)

    def after_update(self, params: Any, state: State) -> tuple[Any, State]:
        """Scale prototypes to length 1 (`config.loss.normalize_last_layer`)."""
        if self._config.loss.normalize_last_layer:
            params = normalize_prototypes(params)
        return params, state

    def sign_of_collapse(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """Look for a loss of ln K, or equal embeddings."""
        return sign_of_collapse(row, self._config.model.head.dims[-1])

    def plan(self, sizes: Any) -> Iterator[tuple[str, str]]:
        """The queue's length."""
        if batches := self.queue_batches(sizes):
            yield 'queue', f'{batches * sizes.batch_size:,} images, {batches} batches'

    def warnings(self, sizes: Any) -> Iterator[str]:
        """Warn of more prototypes than images can fill, and of a queue that is never used."""
        prototypes, batch = max(self._config.model.head.num_clusters), sizes.batch_size
        batches = self.queue_batches(sizes)
        most = sizes.most_prototypes(batches * batch)
        if prototypes > most:
            queue = math.ceil((prototypes - batch) / batch) * batch
            yield (
                f'{batch * (1 + batches):,} images (batch and queue) share {prototypes:,} '
                f'prototypes, more than the {most:,} that they can fill: set '
                f'config.loss.queue.queue_length={queue} with a late start_iter, use more '
                'config.train.micro_batches or devices, or fewer config.model.head.num_clusters'
            )
        full = self._config.loss.queue.start_iter + batches
        if batches and full >= sizes.last_step:
            yield (
                f'the queue is full after step {full:,}, the run ends after {sizes.last_step:,}: '
                'lower config.loss.queue.start_iter or queue_length'
            )

    def notes(self, sizes: Any) -> Iterator[str]:
        """Report a queue that is shorter than the setting."""
        asked = self._config.loss.queue.queue_length
        held = self.queue_batches(sizes) * sizes.batch_size
        if asked != held:
            yield (
                f'config.loss.queue.queue_length={asked} is lowered to {held}, '
                'a multiple of the batch'
            )
