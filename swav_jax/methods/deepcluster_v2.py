"""DeepCluster-v2: prediction of the clusters that k-means finds before every epoch.

Caron et al. 2020 (arXiv 2006.09882, section 4 and appendix), as VISSL's `deepclusterv2_loss` and
the official `main_deepclusterv2.py` have it. A memory bank holds the embeddings of an epoch's
images. Before the next epoch each prototype head clusters them; the prototypes are the centroids,
and all crops of an image predict its cluster.

Letters: V crops of B images, M of them in the bank, T steps of an epoch, N images of the data, H
prototype heads of K_h clusters, D dimensions.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from swav_jax.errors import UserError, refusal
from swav_jax.methods.health import health, sign_of_collapse
from swav_jax.methods.kmeans import spherical_kmeans
from swav_jax.methods.method import Batch, Learned, Method, Network, Outputs
from swav_jax.parallel.mesh import AXES, REPLICATED

IGNORED = -100  # the cluster of an image that has none, as in torch.nn.functional.cross_entropy
NOWHERE = -1  # the number of an image that is not in the bank


class DeepClusterState(NamedTuple):
    """The method's state: the memory bank, and what was found in it before this epoch."""

    embeddings: jax.Array  # (M, T, G, D): crop m of the image in row g of the epoch's batch t
    index: jax.Array  # (T, G) int32, that image's number, or NOWHERE
    assignments: jax.Array  # (H, N) int32, clusters by image number, or IGNORED
    centroids: tuple[jax.Array, ...]  # for each head, (K_h, D)


def cross_entropy(scores: jax.Array, targets: jax.Array, replicas: int) -> jax.Array:
    """Mean over a device's replicas of the mean cross entropy of rows that have a target.

    A replica without such rows adds 0.

    Args:
      scores: (V, B, K), divided by the temperature.
      targets: (B,) int32, or IGNORED.
      replicas: of the B images, one after the other.
    """
    has = jnp.broadcast_to(targets != IGNORED, scores.shape[:2])
    at = jnp.where(targets == IGNORED, 0, targets)
    log_p = jax.nn.log_softmax(scores)
    losses = -jnp.take_along_axis(log_p, jnp.broadcast_to(at, has.shape)[..., None], -1)[..., 0]
    losses, has = (x.reshape(len(scores), replicas, -1) for x in (losses, has))
    sums = jnp.sum(jnp.where(has, losses, 0), (0, 2))
    return jnp.mean(sums / jnp.maximum(jnp.sum(has, (0, 2)), 1))


def assignments_of(index: jax.Array, codes: jax.Array, num_images: int) -> jax.Array:
    """Clusters by image number, (N,) int32, inside `shard_map`.

    Args:
      index, codes: (T, B) this device's part of the bank: the images' numbers, their clusters.
      num_images: N.
    """
    found = jnp.full(num_images, IGNORED, jnp.int32)
    found = found.at[_inside(index, num_images)].max(codes, mode='drop')
    return lax.pmax(found, AXES)


def first_centroids(
    key: jax.Array, embeddings: jax.Array, index: jax.Array, num_images: int, num_clusters: int
) -> jax.Array:
    """Embeddings (K, D) of K images of the bank, drawn at random; inside `shard_map`.

    An image that is twice in the bank, after batches were skipped, adds its mean.

    They are drawn by the images' numbers, so they are the same on any number of devices.

    Args:
      key: of the random numbers.
      embeddings, index: (T, B, D), (T, B) this device's part of the bank.
      num_images, num_clusters: N and K.
    """
    at = _inside(index, num_images)
    there = jnp.zeros(num_images).at[at].set(1, mode='drop')
    lots = jax.random.uniform(key, (num_images,), minval=0.5) * lax.pmax(there, AXES)
    drawn = lax.top_k(lots, num_clusters)[1]
    place = jnp.full(num_images, num_clusters).at[drawn].set(jnp.arange(num_clusters))
    place = place.at[at].get(mode='fill', fill_value=num_clusters)
    found = jnp.zeros((num_clusters, embeddings.shape[-1]), embeddings.dtype)
    found = lax.psum(found.at[place].add(embeddings, mode='drop'), AXES)
    return found / jnp.maximum(jnp.linalg.norm(found, axis=-1, keepdims=True), 1e-12)


def _inside(index: jax.Array, num_images: int) -> jax.Array:
    """NOWHERE counts from the end in an index of JAX; N lies outside."""
    return jnp.where(index == NOWHERE, num_images, index)


class DeepClusterV2(Method):
    """DeepCluster-v2 with a run's settings; see `Method`."""

    fixed = ('loss.crops_for_mb',)
    remedy = (
        'Lower the learning rate (config.optimizer.param_schedulers.lr), or use fewer clusters '
        '(config.model.head.num_clusters)'
    )
    fills = True

    def __init__(self, config: Any):
        self._config = config
        self._crops = tuple(config.loss.crops_for_mb)
        self._clusters = tuple(config.model.head.num_clusters)

    def check(self) -> None:
        """Refuse crops that do not exist."""
        total = sum(self._config.data.num_crops)
        if len(set(self._crops)) < len(self._crops) or not set(self._crops) <= set(range(total)):
            raise refusal(
                'config.loss.crops_for_mb',
                self._crops,
                f'different indices of the {total} crops, from 0 to {total - 1}',
            )

    def check_run(self, sizes: Any) -> None:
        """Refuse more clusters than images of an epoch."""
        images = sizes.steps_per_epoch * sizes.batch_size
        if max(self._clusters) > images:
            raise UserError(
                f'config.model.head.num_clusters={self._clusters}: k-means needs at least as many '
                f'images as clusters, use at most the {images:,} of an epoch'
            )

    def init(self, params: Any, batch_stats: Any, sizes: Any) -> tuple[Any, DeepClusterState]:
        """Return the parameters as they are, and an empty bank."""
        centroids = tuple(
            params['head'][f'prototypes{h}']['kernel'].T for h in range(len(self._clusters))
        )
        rows, dim = (sizes.steps_per_epoch, sizes.batch_size), centroids[0].shape[1]
        return params, DeepClusterState(
            jnp.zeros((len(self._crops), *rows, dim), centroids[0].dtype),
            jnp.full(rows, NOWHERE, jnp.int32),
            jnp.full((len(self._clusters), sizes.num_images), IGNORED, jnp.int32),
            centroids,
        )

    def specs(self, state: DeepClusterState) -> DeepClusterState:
        """Split the bank like the batch."""
        centroids = tuple(REPLICATED for _ in state.centroids)
        return DeepClusterState(P(None, None, AXES), P(None, AXES), REPLICATED, centroids)

    def fill(
        self, network: Network, params: Any, batch: Batch, state: DeepClusterState
    ) -> tuple[Any, DeepClusterState]:
        """Store a batch's embeddings; each crop has a pass of its own, as BatchNorm sees it."""
        batch_stats, found = batch.batch_stats, []
        for crop in self._crops:
            outputs, batch_stats = network.forward(params, batch_stats, (crop,))
            found.append(outputs.embeddings[0])
        return batch_stats, self._store(jnp.stack(found), batch, state)

    def before_step(
        self, step: jax.Array, params: Any, state: DeepClusterState, mesh: Mesh
    ) -> DeepClusterState:
        """Cluster the bank in the first step of an epoch."""
        steps = state.index.shape[0]
        key = jax.random.fold_in(jax.random.key(self._config.seed), step // steps)
        specs = self.specs(state)
        found = specs._replace(embeddings=None, index=None)
        cluster = jax.shard_map(self._cluster, mesh=mesh, in_specs=(P(), specs), out_specs=found)
        old = state._replace(embeddings=None, index=None)
        # Of a condition's branches `--plan` counts the one for True, which most steps take.
        new = lax.cond(step % steps > 0, lambda: old, lambda: cluster(key, state))
        return new._replace(embeddings=state.embeddings, index=state.index)

    @jax.named_scope('kmeans')
    def _cluster(self, key: jax.Array, state: DeepClusterState) -> DeepClusterState:
        """One device's part of the clustering of all heads; head h clusters bank h modulo M."""
        num_images, centroids, assignments = state.assignments.shape[1], [], []
        for h, num_clusters in enumerate(self._clusters):
            rows = state.embeddings[h % len(self._crops)]
            start = first_centroids(
                jax.random.fold_in(key, h), rows, state.index, num_images, num_clusters
            )
            found, codes = spherical_kmeans(
                rows,
                state.index != NOWHERE,
                start,
                num_iters=self._config.loss.kmeans_iters,
                axis_names=AXES,
            )
            centroids.append(found)
            assignments.append(assignments_of(state.index, codes, num_images))
        return DeepClusterState(None, None, jnp.stack(assignments), tuple(centroids))

    def loss(
        self, network: Network, params: Any, outputs: Outputs, batch: Batch, state: DeepClusterState
    ) -> Learned:
        """Compute the mean cross entropy of the heads, and store the embeddings."""
        targets = jnp.where(batch.weights > 0, state.assignments[:, batch.index], IGNORED)
        found = lax.stop_gradient(outputs.embeddings[jnp.asarray(self._crops)])
        losses, codes = [], []
        for centroids, of_head in zip(state.centroids, targets, strict=True):
            scores = self._scores(outputs, centroids) / self._config.loss.temperature
            losses.append(cross_entropy(scores, of_head, self._config.train.micro_batches))
            code = jax.nn.one_hot(of_head, len(centroids), dtype=found.dtype)
            codes.append(jnp.broadcast_to(code, (len(found), *code.shape)))
        return Learned(sum(losses) / len(losses), codes, self._store(found, batch, state))

    def _scores(self, outputs: Outputs, centroids: jax.Array) -> jax.Array:
        return jnp.matmul(outputs.embeddings, centroids.T, precision=lax.Precision.HIGHEST)

    def _store(
        self, embeddings: jax.Array, batch: Batch, state: DeepClusterState
    ) -> DeepClusterState:
        """Put this batch's embeddings (M, B, D) in its place of the bank; of bad images nothing."""
        at, good = batch.step % state.index.shape[0], batch.weights > 0
        kept = jnp.where(good[:, None], embeddings, 0).astype(state.embeddings.dtype)
        return state._replace(
            embeddings=state.embeddings.at[:, at].set(kept),
            index=state.index.at[at].set(jnp.where(good, batch.index, NOWHERE)),
        )

    def health(
        self, outputs: Outputs, learned: Learned, weights: jax.Array
    ) -> dict[str, jax.Array]:
        """Compute `health.health` of the crops in the bank and the first prototype head."""
        chosen = jax.tree.map(lambda x: x[jnp.asarray(self._crops)], outputs)
        scores = self._scores(chosen, learned.state.centroids[0])
        return health(learned.loss, chosen.embeddings, scores, learned.codes[0], weights)

    def after_update(self, params: Any, state: DeepClusterState) -> tuple[Any, DeepClusterState]:
        """Set the prototypes to the centroids, whatever the optimizer did to them."""
        head = dict(params['head'])
        for h, centroids in enumerate(state.centroids):
            head[f'prototypes{h}'] = {'kernel': centroids.T}
        return {**params, 'head': head}, state

    def sign_of_collapse(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """Look for a loss of ln K, or equal embeddings."""
        return sign_of_collapse(row, self._config.model.head.dims[-1])

    def plan(self, sizes: Any) -> Iterator[tuple[str, str]]:
        """The bank and k-means."""
        rows, dim = sizes.steps_per_epoch * sizes.batch_size, self._config.model.head.dims[-1]
        held = 4 * len(self._crops) * rows * dim
        yield (
            'memory bank',
            f'{rows:,} images × {len(self._crops)} crops, {held / 1e9:.3g} GB over all devices',
        )
        iters, clusters = self._config.loss.kmeans_iters, sum(self._clusters)
        flops = 2 * (iters + 1) * rows * dim * clusters
        sums, starts = iters * clusters * (dim + 1), clusters * dim
        images = 2 * len(self._clusters) * sizes.num_images  # which are there; their clusters
        yield (
            'k-means',
            f'{flops / 1e12:.3g} TFLOPs an epoch over all devices; each sends '
            f'{4 * (sums + starts + images) / 1e6:.3g} MB',
        )

    def warnings(self, sizes: Any) -> Iterator[str]:
        """Nothing of its own; few images for a prototype are a warning for every method."""
        return iter(())

    def notes(self, sizes: Any) -> Iterator[str]:
        """Report a freeze that has no effect."""
        frozen = self._config.model.temp_frozen_params_iter_map
        if any('prototypes' in name for name, _ in frozen):
            yield (
                'config.model.temp_frozen_params_iter_map is not used for prototypes, which are '
                'centroids'
            )
