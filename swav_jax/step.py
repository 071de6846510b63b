"""One training step: the gradient of each device's crops, and the update.

A device has one replica of the batch, or several in turn: `config.train.micro_batches`.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from swav_jax import augment, methods
from swav_jax.methods.method import Batch, Learned, Network, Outputs
from swav_jax.models import SwAVNet, head
from swav_jax.parallel.layout import Layout
from swav_jax.parallel.mesh import BATCH
from swav_jax.parallel.replicas import Images, images_spec, micro_batches
from swav_jax.precision import MIN_SCALE, all_finite
from swav_jax.state import TrainState


def make_train_step(
    net: SwAVNet, tx: optax.GradientTransformation, config: Any, layout: Layout
) -> Callable[
    [TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array], jax.Array]
]:
    """Return the compiled step over the mesh.

    Args:
      net, tx: the network and the optimizer.
      config: the run's settings.
      layout: of the state on the mesh.

    Returns:
      A function (state, batch) → (state, metrics, news), which donates the state. The batch is that
      of `data.pipeline`, split along axis 0. Metrics are the scalars of `update`, equal on all
      devices. News are (3,) int32, which the loop fetches after every step: whether the step is
      finite, the largest `request` of the batch (B,) int32 (0 without any), by which processes tell
      each other something, and the number of bad images.
    """

    def step(state, batch):
        new, metrics = update(
            net, tx, config, layout, state, batch, batch['weight'], batch['index']
        )
        request = jnp.max(batch['request']) if 'request' in batch else 0
        news = [metrics.pop('finite'), request, metrics['bad_images']]
        return new, metrics, jnp.stack([jnp.asarray(x, jnp.int32) for x in news])

    everywhere = NamedSharding(layout.mesh, P())
    shardings = (layout.shardings, everywhere, everywhere)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def make_fill(
    net: SwAVNet, config: Any, layout: Layout
) -> Callable[[TrainState, jax.Array, Images, jax.Array, jax.Array], TrainState]:
    """Return the compiled function by which a method sees a batch before the first step.

    Args:
      net, config, layout: as in `make_train_step`.

    Returns:
      A function (state, number, images, weights, index), which donates the state; the number counts
      the batches from 0, the rest is as in `update`.
    """

    def see(state, number, images, weights, index):
        network = network_on(net, config, images)
        batch = Batch(number, weights, index, state.batch_stats)
        return methods.make(config).fill(network, layout.own(state.params), batch, state.method)

    def fill(state, number, images, weights, index):
        specs = layout.specs
        seen = jax.shard_map(
            see,
            mesh=layout.mesh,
            in_specs=(specs.replace(opt_state=None), P(), images_spec(images), BATCH, BATCH),
            out_specs=(specs.batch_stats, specs.method),
        )
        batch_stats, own = seen(state.replace(opt_state=None), number, images, weights, index)
        return state.replace(batch_stats=batch_stats, method=own)

    return jax.jit(fill, donate_argnums=0, out_shardings=layout.shardings)


def update(
    net: SwAVNet,
    tx: optax.GradientTransformation,
    config: Any,
    layout: Layout,
    state: TrainState,
    images: Images,
    weights: jax.Array,
    index: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Learn from a batch and update the state.

    Args:
      net, tx, config, layout: as in `make_train_step`.
      state: before the step.
      images: the batch of `data.pipeline`, B rows; or its crops, for each group (n_g, B, S_g, S_g,
        channels). B is split over the devices, whose rows are in the order of `device_rows`.
      weights: (B,) 1, or 0 for an image that must not count.
      index: (B,) int32, the images' numbers in the data, for methods that use them.

    Returns:
      The next state, and metrics of the global batch: `finite`, norms, and those of the method's
      `health`. A step that is not finite, and every step after it, changes nothing but `failed`, so
      the state before it can be written.
    """
    specs, method = layout.specs, methods.make(config)
    learned = jax.shard_map(
        functools.partial(learn, net, config, layout),
        mesh=layout.mesh,
        in_specs=(specs.replace(opt_state=None), images_spec(images), BATCH, BATCH),
        out_specs=(specs.params, specs.batch_stats, specs.method, P()),
    )
    begun = begin(config, layout, state)
    grads, batch_stats, own, metrics = learned(begun, images, weights, index)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = layout.cut_params(optax.apply_updates(state.params, updates))
    params, own = method.after_update(params, own)
    new = state.replace(
        params=layout.pad_params(params), batch_stats=batch_stats, opt_state=opt_state, method=own
    )
    metrics['grad_norm'] = optax.tree.norm(grads)
    metrics['update_norm'] = optax.tree.norm(updates)
    overflow_is_usual = False
    if state.loss_scale is not None:
        finite = all_finite(grads)
        # The step is counted, so what it began with stays: the clusters of an epoch.
        new = _choose(finite, new, state.replace(method=begun.method))
        # An overflow halves the scale and is usual, unless the scale is 1 already.
        overflow_is_usual = state.loss_scale.scale > MIN_SCALE
        new = new.replace(loss_scale=state.loss_scale.adjust(finite))
        metrics['loss_scale'] = state.loss_scale.scale
        metrics['overflows'] = new.loss_scale.overflows
    sound = jnp.isfinite(metrics['loss'])
    sound &= jnp.isfinite(metrics['grad_norm'] + metrics['update_norm']) | overflow_is_usual
    metrics['finite'] = sound & ~state.failed
    new, failed = new.replace(step=state.step + 1), state.replace(failed=jnp.array(True))
    return _choose(metrics['finite'], new, failed), metrics


def begin(config: Any, layout: Layout, state: TrainState) -> TrainState:
    """The state with which a step's forward pass begins, without the optimizer's."""
    own = methods.make(config).before_step(
        state.step, layout.cut_params(state.params), state.method, layout.mesh
    )
    return state.replace(method=own, opt_state=None)


def learn(
    net: SwAVNet,
    config: Any,
    layout: Layout,
    state: TrainState,
    images: Images,
    weights: jax.Array,
    index: jax.Array | None,
) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
    """One device's part of a step, inside `shard_map`.

    Args:
      net, config, layout: as in `make_train_step`.
      state: the device's share of the state, without the optimizer's.
      images, weights, index: the device's share, as in `update`.

    Returns:
      The gradient, averaged over all devices and split like the parameters; BatchNorm's running
      statistics; the method's state after this batch; and metrics of the global batch.
    """
    scale = 1.0 if state.loss_scale is None else state.loss_scale.scale

    def loss_of(params):
        found = objective(net, config, params, state, images, weights, index)
        return found.learned.loss * scale, found

    grads, found = jax.grad(loss_of, has_aux=True)(layout.own(state.params))
    grads = jax.tree.map(lambda g: g / scale, layout.average(grads))
    metrics = methods.make(config).health(found.outputs, found.learned, weights)
    return grads, found.batch_stats, found.learned.state, metrics


class Found(NamedTuple):
    """What a device computes before the gradient."""

    outputs: Outputs
    batch_stats: Any
    learned: Learned


def objective(
    net: SwAVNet,
    config: Any,
    params: Any,
    state: TrainState,
    images: Images,
    weights: jax.Array,
    index: jax.Array | None,
) -> Found:
    """Compute a device's loss inside `shard_map`, like `learn`, of whole `params`."""
    network = network_on(net, config, images)
    outputs, batch_stats = network.forward(params, state.batch_stats)
    batch = Batch(state.step, weights, index, batch_stats)
    learned = methods.make(config).loss(network, params, outputs, batch, state.method)
    return Found(outputs, batch_stats, learned)


def network_on(net: SwAVNet, config: Any, images: Images) -> Network:
    """The network's functions for a device's images."""
    return Network(
        functools.partial(forward_in_turn, net, config, images),
        lambda params, z: head.prototype_scores(params['head'], z),
    )


def forward_in_turn(
    net: SwAVNet,
    config: Any,
    images: Images,
    params: Any,
    batch_stats: Any,
    crops: Sequence[int] | None = None,
    train: bool = True,
) -> tuple[Outputs, Any]:
    """Outputs of the network for a device's images, one micro-batch after the other.

    A micro-batch is what a replica on a device of its own would be. Only its outputs are kept: the
    backward pass cuts its crops and computes it again, and adds its gradient to that of the others.
    So codes are those of the whole batch, and the gradient is exact. Every micro-batch moves the
    same running statistics, and their average is kept, as over BatchNorm groups.
    """

    def forward_one(images):
        cut = crops_of(config, images)
        if crops is not None:
            of_all = [group[i : i + 1] for group in cut for i in range(len(group))]
            cut = [of_all[i] for i in crops]
        return forward(net, config, params, batch_stats, cut, train)

    count = config.train.micro_batches
    if count == 1:
        return forward_one(images)
    outputs, new = lax.map(
        jax.checkpoint(forward_one, prevent_cse=False), micro_batches(images, count)
    )
    joined = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1]), outputs
    )
    return joined, jax.tree.map(lambda x: jnp.mean(x, 0), new)


def crops_of(config: Any, images: Images) -> list[jax.Array]:
    """Crops of images that may be crops already: for each group (n_g, B, S_g, S_g, channels).

    They are float64 if `config.precision` is, else float32.
    """
    if not isinstance(images, Mapping):
        return list(images)
    dtype = jnp.promote_types(jnp.dtype(config.precision), jnp.float32)
    groups = augment.multi_crop(
        images, seed=config.seed, data=config.data, augment=config.augment, dtype=dtype
    )
    counts = config.data.num_crops
    return [x.reshape(n, -1, *x.shape[1:]) for n, x in zip(counts, groups, strict=True)]


def forward(
    net: SwAVNet,
    config: Any,
    params: Any,
    batch_stats: Any,
    crops: list[jax.Array],
    train: bool = True,
) -> tuple[Outputs, Any]:
    """Outputs of the network for a micro-batch's crops, and BatchNorm's new statistics.

    Neighbouring groups of crops of equal size share a pass through the trunk, or each crop has its
    own (`config.train.per_crop_pass`), as in VISSL.
    """
    if config.train.per_crop_pass:
        passes = [crop for group in crops for crop in group]
    else:
        runs = itertools.groupby(crops, key=lambda group: group.shape[2])
        groups = [jnp.concatenate(list(run)) for _, run in runs]
        passes = [group.reshape(-1, *group.shape[2:]) for group in groups]
    outputs, new = net.apply(
        {'params': params, 'batch_stats': batch_stats},
        passes,
        train=train,
        recompute_passes=config.train.per_crop_pass,
        mutable=['batch_stats'],
    )
    num_images = crops[0].shape[1]
    by_crop = jax.tree.map(lambda x: x.reshape(-1, num_images, x.shape[-1]), outputs)
    return Outputs(*by_crop), new.get('batch_stats', {})


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
