"""One training step of SwAV: what each replica learns from its crops, and the update."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from swav_jax import augment
from swav_jax.methods import swav
from swav_jax.models import SwAVNet, head
from swav_jax.parallel.mesh import AXES, BATCH, CROPS
from swav_jax.precision import COMPUTE_DTYPES, MIN_SCALE, all_finite
from swav_jax.state import Layout, TrainState


def loss_settings(config: Any) -> dict[str, Any]:
    """`config.loss` and the crops as the arguments of `swav.swav_loss`."""
    return dict(
        num_crops=sum(config.data.num_crops),
        crops_for_assign=tuple(config.loss.crops_for_assign),
        temperature=config.loss.temperature,
        epsilon=config.loss.epsilon,
        num_iters=config.loss.num_iters,
        powerlaw=config.loss.shk_powerlaw,
        use_double_precision=config.loss.use_double_precision,
    )


def make_train_step(
    net: SwAVNet, tx: optax.GradientTransformation, config: Any, layout: Layout
) -> Callable[
    [TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array], jax.Array]
]:
    """The compiled step over the mesh: images and crop boxes in; state, metrics and news out.

    Args:
      net, tx: the network and the optimizer.
      config: the run's settings.
      layout: how the state lies on the mesh.

    Returns:
      A function of (state, batch), which donates the state. The batch is that of `data.pipeline`,
      split along axis 0. Metrics are the scalars of `update`, the same on all replicas. News is
      what the loop has to know of every step, (3,) int32 to be fetched at once: whether the step
      is finite, the largest of the batch's `request` (B,) int32 (0 without any), by which
      processes tell each other something, and how many images are bad.
    """

    def step(state, batch):
        crops = multi_crop(config, layout.mesh, batch)
        new, metrics = update(net, tx, config, layout, state, crops, batch['weight'])
        request = jnp.max(batch['request']) if 'request' in batch else 0
        news = [metrics.pop('finite'), request, metrics['bad_images']]
        return new, metrics, jnp.stack([jnp.asarray(x, jnp.int32) for x in news])

    everywhere = NamedSharding(layout.mesh, P())
    shardings = (layout.shardings, everywhere, everywhere)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def multi_crop(config: Any, mesh: Mesh, batch: Mapping[str, jax.Array]) -> list[jax.Array]:
    """Each replica's crops of its images: for each group (n_g, B, S_g, S_g, channels).

    float32, or float64 where `config.precision` is.
    """
    dtype = jnp.promote_types(COMPUTE_DTYPES[config.precision], jnp.float32)

    def render(batch):
        groups = augment.multi_crop(
            batch, seed=config.seed, data=config.data, augment=config.augment, dtype=dtype
        )
        counts = config.data.num_crops
        return [x.reshape(n, -1, *x.shape[1:]) for n, x in zip(counts, groups, strict=True)]

    return jax.shard_map(render, mesh=mesh, in_specs=BATCH, out_specs=CROPS)(batch)


def update(
    net: SwAVNet,
    tx: optax.GradientTransformation,
    config: Any,
    layout: Layout,
    state: TrainState,
    crops: list[jax.Array],
    weights: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from given crops.

    Args:
      net, tx, config, layout: as in `make_train_step`.
      state: the state.
      crops: for each group of crops, (n_g, B, S_g, S_g, channels), B split over all replicas.
      weights: (B,) 1, or 0 for an image that must not count.

    Returns:
      The next state, and metrics of the global batch: `finite`, and those of `health`. A step that
      is not finite changes nothing but the sign of `step`, and nor do those after it: the state
      stays what it was before, for a dump.
    """
    specs = layout.specs
    learned = jax.shard_map(
        functools.partial(learn, net, config, layout),
        mesh=layout.mesh,
        in_specs=(specs.replace(opt_state=None), CROPS, BATCH),
        out_specs=(specs.params, specs.batch_stats, specs.queue, P()),
    )
    grads, batch_stats, queue, metrics = learned(state.replace(opt_state=None), crops, weights)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if config.loss.normalize_last_layer:
        params = swav.normalize_prototypes(params)
    new = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state, queue=queue)
    metrics['grad_norm'] = optax.tree.norm(grads)
    metrics['update_norm'] = optax.tree.norm(updates)
    overflow_is_usual = False
    if state.loss_scale is not None:
        finite = all_finite(grads)
        new = _choose(finite, new, state)
        # An overflow halves the scale and is nothing unusual, unless the scale is 1 already.
        overflow_is_usual = state.loss_scale.scale > MIN_SCALE
        new = new.replace(loss_scale=state.loss_scale.adjust(finite))
        metrics['loss_scale'] = state.loss_scale.scale
        metrics['overflows'] = new.loss_scale.overflows
    sound = jnp.isfinite(metrics['loss'])
    sound &= jnp.isfinite(metrics['grad_norm'] + metrics['update_norm']) | overflow_is_usual
    metrics['finite'] = sound & (state.step >= 0)
    kept = state.replace(step=jnp.minimum(state.step, ~state.step))
    return _choose(metrics['finite'], new.replace(step=state.step + 1), kept), metrics


def learn(
    net: SwAVNet,
    config: Any,
    layout: Layout,
    state: TrainState,
    crops: list[jax.Array],
    weights: jax.Array,
) -> tuple[Any, Any, swav.Queue | None, dict[str, jax.Array]]:
    """One replica's part of a step, inside `shard_map`: what its crops say.

    Args:
      net, config, layout: as in `make_train_step`.
      state: the replica's share of the state, without the optimizer's.
      crops: this replica's, for each group (n_g, B, S_g, S_g, channels).
      weights: (B,) as in `update`.

    Returns:
      The gradient, averaged over all replicas and laid out like the parameters; BatchNorm's
      running statistics; the queue with this batch; and metrics of the global batch.
    """
    settings = loss_settings(config)
    assign = jnp.asarray(settings['crops_for_assign'])
    queue, num_images = state.queue, weights.shape[0]
    hard = state.step < config.loss.temp_hard_assignment_iters
    scale = 1.0 if state.loss_scale is None else state.loss_scale.scale

    def loss_of(params):
        (embeddings, scores), new = forward(net, config, params, state.batch_stats, crops)
        old_scores = queue and head.prototype_scores(
            lax.stop_gradient(params['head']), queue.embeddings
        )
        loss, codes = swav.swav_loss(
            scores, old_scores, queue, weights, hard_assignment=hard, axis_names=AXES, **settings
        )
        return loss * scale, (loss, new['batch_stats'], embeddings, scores, codes)

    grads, (loss, batch_stats, embeddings, scores, codes) = jax.grad(loss_of, has_aux=True)(
        layout.own(state.params)
    )
    grads = jax.tree.map(lambda g: g / scale, layout.average(grads))

    embeddings = lax.stop_gradient(embeddings).reshape(-1, num_images, embeddings.shape[-1])[assign]
    if queue is not None:
        pushed = queue.push(embeddings.astype(queue.embeddings.dtype), weights)
        queue = _choose(state.step >= config.loss.queue.start_iter, pushed, queue)
    metrics = health(loss, embeddings, scores[0], codes[0], weights, settings)
    return grads, batch_stats, queue, metrics


def forward(
    net: SwAVNet, config: Any, params: Any, batch_stats: Any, crops: list[jax.Array]
) -> tuple[tuple[jax.Array, tuple[jax.Array, ...]], Any]:
    """Embeddings and scores of one replica's crops (see `SwAVNet`), and the new statistics.

    Crops of equal size in neighbouring groups share a pass through the trunk, or each crop has one
    of its own: VISSL's two ways.
    """
    if config.train.per_crop_pass:
        passes = [crop for group in crops for crop in group]
    else:
        runs = itertools.groupby(crops, key=lambda group: group.shape[2])
        groups = [jnp.concatenate(list(run)) for _, run in runs]
        passes = [group.reshape(-1, *group.shape[2:]) for group in groups]
    return net.apply(
        {'params': params, 'batch_stats': batch_stats},
        passes,
        train=True,
        recompute_passes=config.train.per_crop_pass,
        mutable=['batch_stats'],
    )


@jax.named_scope('health')
def health(
    loss: jax.Array,
    embeddings: jax.Array,
    scores: jax.Array,
    codes: jax.Array,
    weights: jax.Array,
    settings: dict[str, Any],
) -> dict[str, jax.Array]:
    """The global batch's loss and signs of collapse, in one all-reduce.

    Args:
      loss: () this replica's loss.
      embeddings: (A, B, D) of the assign crops.
      scores, codes: (V·B, K) and (A, B, K) of the first prototype head.
      weights: (B,) 1, or 0 for an image that must not count.
      settings: see `loss_settings`.

    Returns:
      A dict of scalars:

      - `loss`;
      - `code_entropy`: of an image's code in nats, mean over images; ln K when all are uniform;
      - `active_prototypes`: how many are the nearest one of some assign crop;
      - `largest_prototype_share`: share of the assign crops that are nearest to the same one;
      - `embedding_std`: mean over dimensions; 0 when all are equal, 1/√D when they spread;
      - `bad_images`: of weight 0.
    """
    num_crops, num_images, num_prototypes = settings['num_crops'], len(weights), codes.shape[-1]
    assign = jnp.asarray(settings['crops_for_assign'])
    nearest = jnp.argmax(scores.reshape(num_crops, num_images, -1)[assign], -1)
    votes = jnp.sum(jax.nn.one_hot(nearest, num_prototypes) * weights[:, None], (0, 1))
    entropy = -jnp.sum(jax.scipy.special.xlogy(codes, codes), -1)
    total = lax.psum(
        jnp.concatenate(
            [
                jnp.stack([loss, 1.0, jnp.sum(weights), num_images, jnp.sum(weights * entropy)]),
                jnp.sum(weights[:, None] * embeddings, (0, 1)),
                jnp.sum(weights[:, None] * jnp.square(embeddings), (0, 1)),
                votes,
            ],
            dtype=loss.dtype,
        ),
        AXES,
    )
    dim = embeddings.shape[-1]
    scalars, sums, squares, votes = jnp.split(total, [5, 5 + dim, 5 + 2 * dim])
    loss, replicas, counted, images, entropy = scalars
    samples = jnp.maximum(counted * len(codes), 1.0)
    variance = squares / samples - jnp.square(sums / samples)
    return {
        'loss': loss / replicas,
        'code_entropy': entropy / samples,
        'active_prototypes': jnp.sum(votes > 0),
        'largest_prototype_share': jnp.max(votes) / samples,
        'embedding_std': jnp.mean(jnp.sqrt(jnp.maximum(variance, 0.0))),
        'bad_images': images - counted,
    }


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two trees of the same structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
