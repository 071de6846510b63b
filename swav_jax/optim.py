"""LARC, SGD and Adam as optax transformations, frozen parameters, learning-rate schedules.

The order of operations is apex's and PyTorch's: decay and LARC act on the gradient, momentum sums
the result, the learning rate multiplies the sum. (optax.lars multiplies before the momentum.)
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from swav_jax.cpu.materialize import computed_once

Schedule = Callable[[Any], Any]


def scale_by_larc(
    trust_coefficient: float = 0.001,
    *,
    weight_decay: float = 0.0,
    decay_mask: Any = None,
    eps: float = 1e-8,
    clip: bool = False,
    learning_rate: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformation:
    """Layer-wise adaptive rate control, as NVIDIA apex computes it (You et al. 2017, 1708.03888).

    For a tensor p with gradient g, biases and normalisation included:

        rate = trust_coefficient · ‖p‖ / (‖g‖ + weight_decay · ‖p‖ + eps)
        rate = min(rate / learning_rate, 1)                                (with `clip`)
        g ← rate · (g + weight_decay · p)

    A gradient where ‖p‖ = 0 or ‖g‖ = 0 is not changed, and gets no decay.

    Args:
      trust_coefficient: length of an update at learning rate 1, as a share of the tensor's length.
      weight_decay: L2 penalty, added to the gradient.
      decay_mask: tree of bools like the parameters: whether each is decayed. None: all are.
      eps: added to the denominator.
      clip: bound the effective rate by `learning_rate` itself.
      learning_rate: the one that the chain applies afterwards; used with `clip` only.

    Returns:
      A transformation whose `update` needs `params`.
    """

    def update(grads, state, params=None):
        if params is None:
            raise ValueError('scale_by_larc needs the parameters: update(grads, state, params)')
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def scale(g, p, decayed):
            wd = weight_decay if decayed else 0.0
            p_norm, g_norm = optax.tree.norm(p), optax.tree.norm(g)
            rate = trust_coefficient * p_norm / (g_norm + wd * p_norm + eps)
            if clip:
                rate = jnp.minimum(rate / lr, 1.0)
            return jnp.where((p_norm > 0) & (g_norm > 0), rate * (g + wd * p), g)

        mask = jax.tree.map(lambda _: True, params) if decay_mask is None else decay_mask
        scaled = jax.tree.map(scale, grads, params, mask)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32)), update
    )


class FreezeState(NamedTuple):
    """Number of updates so far, and the state of the inner optimizer."""

    count: Int[Array, '']
    inner: Any


def freeze_first(
    inner: optax.GradientTransformation, iters: Mapping[str, int]
) -> optax.GradientTransformation:
    """Freeze parameters for their first iterations: no update, no decay, no momentum.

    VISSL's TEMP_FROZEN_PARAMS_ITER_MAP. While a parameter is frozen, the inner optimizer gets a
    zero gradient and a zero parameter, so that no momentum builds up.

    Args:
      inner: the optimizer.
      iters: for each pattern, the number of updates to skip. A pattern fits every parameter whose
        path (`head/prototypes0/kernel`) contains it as whole names.

    Raises:
      ValueError: at `init`, if a pattern fits no parameter.
    """

    def init(params):
        names = [f'/{path_name(path)}/' for path, _ in jax.tree.leaves_with_path(params)]
        for pattern in iters:
            if not any(f'/{pattern}/' in name for name in names):
                raise ValueError(f'the pattern {pattern!r} fits none of the parameters')
        return FreezeState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads, state, params=None):
        def thaw(tree):
            return jax.tree.map(
                lambda x, n: jnp.where(state.count < n, 0, x) if n else x,
                tree,
                frozen_for(tree, iters),
            )

        updates, inner_state = inner.update(thaw(grads), state.inner, thaw(params))
        return thaw(updates), FreezeState(optax.safe_increment(state.count), inner_state)

    return optax.GradientTransformation(init, update)


def frozen_for(params: Any, iters: Mapping[str, int]) -> Any:
    """Tree of the number of updates that each parameter skips; see `freeze_first` for `iters`."""

    def of(path, _):
        name = f'/{path_name(path)}/'
        return max((n for pattern, n in iters.items() if f'/{pattern}/' in name), default=0)

    return jax.tree.map_with_path(of, params)


def scale_by_adam(
    iters: Mapping[str, int], betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2014, 1412.6980), whose averages begin when a parameter thaws.

    While a parameter is frozen, its averages and their bias correction stand still, as in PyTorch,
    where it has no gradient. Otherwise they would count zeros, and its first hundreds of updates
    would be up to six times too long.

    Args:
      iters: see `freeze_first`.
      betas: decay of the averages of the gradient and of its square.
      eps: added to the root of the latter.
    """
    adam = optax.scale_by_adam(*betas, eps=eps)

    def from_step(n):
        return optax.transforms.conditionally_mask(adam, lambda step: step >= n) if n else adam

    groups = {n: from_step(n) for n in {0, *iters.values()}}
    return optax.partition(groups, lambda params: frozen_for(params, iters))


def updates_made(opt_state: Any) -> Int[Array, '']:
    """Number of updates so far: fewer than steps if float16 overflowed."""
    return opt_state.count


def path_name(path: Sequence[Any]) -> str:
    """A parameter's path as `head/prototypes0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def decay_mask(params: Any, *, regularize_bn: bool, regularize_bias: bool) -> Any:
    """Tree of bools: whether each parameter is decayed (VISSL's regularize_bn, regularize_bias).

    A module with a `scale` is a BatchNorm: its `scale` and its `bias` follow `regularize_bn`. Any
    other `bias` follows `regularize_bias`.
    """
    norms = {
        path_name(path[:-1])
        for path, _ in jax.tree.leaves_with_path(params)
        if path_name(path[-1:]) == 'scale'
    }

    def decayed(path, _):
        if path_name(path[:-1]) in norms:
            return regularize_bn
        return regularize_bias or path_name(path[-1:]) != 'bias'

    return jax.tree.map_with_path(decayed, params)


def make_optimizer(
    optimizer: Any,
    learning_rate: optax.ScalarOrSchedule,
    frozen_iters: Mapping[str, int],
    params: Any,
) -> optax.GradientTransformation:
    """Return the optimizer of a run.

    Args:
      optimizer: `config.optimizer`. `sgd` is SGD, with LARC if `use_larc`; `lars` is optax.lars
        with the numbers of `larc_config`; `adam` adds the decay to the gradient, `adamw` to the
        update, as in PyTorch. For settings that one of them does not use see `unread`.
      learning_rate: a number or a function of the number of updates.
      frozen_iters: see `freeze_first`.
      params: the parameters, or their shapes.
    """
    mask = decay_mask(
        params,
        regularize_bn=optimizer['regularize_bn'],
        regularize_bias=optimizer['regularize_bias'],
    )
    weight_decay, momentum = optimizer['weight_decay'], optimizer['momentum']
    if callable(learning_rate):
        learning_rate = functools.partial(_rate_for_all, learning_rate)
    larc = optimizer['larc_config']
    by_rate = optax.scale_by_learning_rate(learning_rate)
    decayed = optax.add_decayed_weights(weight_decay, mask)
    match optimizer['name']:
        case 'sgd':
            scaled = decayed
            if optimizer['use_larc']:
                scaled = scale_by_larc(
                    larc['trust_coefficient'],
                    weight_decay=weight_decay,
                    decay_mask=mask,
                    eps=larc['eps'],
                    clip=larc['clip'],
                    learning_rate=learning_rate,
                )
            tx = optax.chain(scaled, optax.trace(momentum, nesterov=optimizer['nesterov']), by_rate)
        case 'lars':
            tx = optax.lars(
                learning_rate,
                weight_decay,
                weight_decay_mask=mask,
                trust_coefficient=larc['trust_coefficient'],
                eps=larc['eps'],
                momentum=momentum,
                nesterov=optimizer['nesterov'],
            )
        case 'adam' | 'adamw':
            adam = scale_by_adam(frozen_iters, optimizer['betas'], optimizer['eps'])
            first = (decayed, adam) if optimizer['name'] == 'adam' else (adam, decayed)
            tx = optax.chain(*first, by_rate)
    return freeze_first(tx, frozen_iters)


def unread(optimizer: Any) -> list[str]:
    """Lines about settings of `config.optimizer` that the optimizer of this name does not use."""
    name = optimizer['name']
    if name == 'sgd':
        return []
    ignored = {
        'use_larc': optimizer['use_larc'],
        'larc_config.clip': optimizer['larc_config']['clip'],
    }
    return [
        f'config.optimizer.name={name!r} scales each {"layer" if name == "lars" else "weight"} by '
        f'itself and takes no notice of config.optimizer.{setting}=True: set it to False, or use '
        'LARC, config.optimizer.name=sgd'
        for setting, wanted in ignored.items()
        if wanted
    ]


def _rate_for_all(schedule, count):
    # XLA would compute the schedule again for every parameter: a sixth of a RegNet's program.
    return computed_once(jnp.asarray(schedule(count)))


# --- Schedules: functions of where = position in the run, from 0 to 1 --------------------------

# ClassyVision's tolerance for rounding at the borders of epochs and pieces.
WHERE_EPSILON = 1e-6


def schedule(lr: Any) -> Schedule:
    """Return a learning rate as a function of `where`, the done share of the run, in [0, 1].

    ClassyVision's and VISSL's parameter schedulers, by `lr['name']`:

    - `constant`: value.
    - `linear`, `cosine`: from start_value to end_value.
    - `multistep`: values[i] between milestones[i - 1] and milestones[i], in epochs of num_epochs.
    - `cosine_warm_restart`: cosines of restart_interval_length each; after restart i the peak is
      start_value · lr_multiplier^i or, with is_adaptive, the cosine of the whole run. wave_type
      `half` falls and jumps back, `full` falls and climbs.
    - `composite`: schedulers one after the other over lengths; interval_scaling `rescaled`
      stretches a piece over its own interval, `fixed` reads it at the run's position.

    Raises:
      ValueError: the name is unknown, or the lengths of a composite do not sum to 1.
    """
    match lr['name']:
        case 'constant':
            return lambda where: lr['value'] + 0.0 * where
        case 'linear':
            return lambda where: lr['start_value'] * (1 - where) + lr['end_value'] * where
        case 'cosine':
            return lambda where: _cosine(where, lr['start_value'], lr['end_value'])
        case 'multistep':
            return lambda where: _multistep(where, lr)
        case 'cosine_warm_restart':
            return lambda where: _cosine_warm_restart(where, lr)
        case 'composite':
            return _composite(lr)
    raise ValueError(f'unknown schedule {lr["name"]!r}')


def _cosine(where, start, end):
    return end + 0.5 * (start - end) * (1 + jnp.cos(jnp.pi * where))


def _multistep(where, lr):
    epoch = jnp.floor((where + WHERE_EPSILON) * lr['num_epochs'])
    piece = jnp.searchsorted(jnp.asarray(lr['milestones']), epoch, side='right')
    return jnp.asarray(lr['values'], jnp.result_type(float))[piece]


def _cosine_warm_restart(where, lr):
    start, end, interval = lr['start_value'], lr['end_value'], lr['restart_interval_length']
    full = lr['wave_type'] == 'full'
    restarts = np.append(0.0, np.arange(interval, 1.0, 2 * interval if full else interval))
    if lr['is_adaptive']:
        cosines = np.cos(np.pi * (restarts + (interval if full else 0.0)))
        peaks = end + 0.5 * (start - end) * (1 + cosines)
    else:
        peaks = start * np.power(lr['lr_multiplier'], np.arange(len(restarts)))
    peak = jnp.asarray(peaks)[jnp.searchsorted(jnp.asarray(restarts), where, side='right') - 1]
    return _cosine(where / interval if full else (where % interval) / interval, peak, end)


def _composite(lr):
    lengths, scalings = np.asarray(lr['lengths'], float), lr['interval_scaling']
    if not math.isclose(lengths.sum(), 1.0, abs_tol=1e-6):
        raise ValueError(f'the lengths {tuple(lr["lengths"])} sum to {lengths.sum():g}, not to 1')
    ends = np.cumsum(lengths)
    starts = ends - lengths
    pieces = [schedule(piece) for piece in lr['schedulers']]

    def composite(where):
        index = jnp.searchsorted(jnp.asarray(ends[:-1]), where + WHERE_EPSILON)
        values = [
            piece((where - start) / length if scaling == 'rescaled' else where)
            for piece, scaling, start, length in zip(pieces, scalings, starts, lengths, strict=True)
        ]
        return jnp.stack(jnp.broadcast_arrays(*values))[index]

    return composite


def scale_learning_rate(lr: Any, batch_size: int) -> dict[str, Any]:
    """Scale a schedule to a global batch of `batch_size` images (VISSL's auto_lr_scaling).

    The scaled rate is base_value · batch_size / base_lr_batch_size, or base_value times the square
    root of that ratio with scaling_type `sqrt`. It becomes the highest rate of the schedule. All
    other rates keep their ratio to it, except the start of a warm-up at the beginning of the run:
    it stays, unless it is above the scaled rate (then VISSL drops the warm-up).
    """
    scaling = lr.get('auto_lr_scaling')
    if not scaling or not scaling['auto_scale']:
        return dict(lr)
    factor = batch_size / scaling['base_lr_batch_size']
    peak = scaling['base_value'] * (
        math.sqrt(factor) if scaling['scaling_type'] == 'sqrt' else factor
    )
    scaled = _multiply(lr, peak / _peak(lr))
    opening, kept = scaled, lr
    if lr['name'] == 'composite':
        opening, kept = scaled['schedulers'][0], lr['schedulers'][0]
    if kept['name'] == 'linear' and kept['start_value'] < min(kept['end_value'], peak):
        opening['start_value'] = kept['start_value']
    return scaled


def _peak(lr):
    if lr['name'] == 'composite':
        return max(_peak(piece) for piece in lr['schedulers'])
    if lr['name'] == 'multistep':
        return max(lr['values'])
    return max(lr[key] for key in ('value', 'start_value', 'end_value') if key in lr)


def _multiply(lr, factor):
    scaled = dict(lr)
    for key in ('value', 'start_value', 'end_value'):
        if key in lr:
            scaled[key] = factor * lr[key]
    if lr['name'] == 'multistep':
        scaled['values'] = tuple(factor * value for value in lr['values'])
    if lr['name'] == 'composite':
        scaled['schedulers'] = tuple(_multiply(piece, factor) for piece in lr['schedulers'])
    return scaled


def learning_rate(lr: Any, *, batch_size: int, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Return the learning rate as a function of the step, scaled to the batch.

    With update_interval `epoch` it is constant within an epoch.
    """
    at = schedule(scale_learning_rate(lr, batch_size))
    interval = steps_per_epoch if lr.get('update_interval', 'step') == 'epoch' else 1

    def of_step(step: Float[Array, ''] | Int[Array, ''] | int):
        return at((step // interval) * interval / total_steps)

    return of_step
