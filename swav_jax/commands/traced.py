"""The cost of a step, counted in its trace: nothing is compiled or allocated."""

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict

from swav_jax import models, step

COLLECTIVES = ('psum', 'psum_invariant', 'pmax', 'all_gather', 'reduce_scatter')


def batch_shapes(config: ConfigDict, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch of `data.pipeline.train_batches`."""
    side, crops = config.data.canvas_size, sum(config.data.num_crops)
    shapes = {
        'image': ((side, side, config.data.channels), jnp.uint8),
        'size': ((2,), jnp.int32),
        'boxes': ((crops, 4), jnp.float32),
        'weight': ((), jnp.float32),
        'epoch': ((), jnp.int32),
        'position': ((), jnp.int32),
        'index': ((), jnp.int32),
    }
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }


def cost(function: Callable, *args: Any) -> Counter:
    """Count `flops` of convolutions and matrix products, and `bytes_sent`, in a function's trace.

    Inside `shard_map` this is one device's share. A multiplication with an addition is 2 FLOPs.
    """
    return _cost(jax.make_jaxpr(function)(*args).jaxpr)


def _cost(jaxpr: Jaxpr) -> Counter:
    total = Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == 'dot_general':
            total['flops'] += _product_flops(equation)
        elif name == 'conv_general_dilated':
            total['flops'] += _convolution_flops(equation)
        elif name in COLLECTIVES:
            total['bytes_sent'] += sum(_bytes(x.aval) for x in equation.invars)
        inner = [_cost(j) for j in _inner(equation.params)]
        if (
            name == 'cond'
        ):  # by platform: all but the CPU run the last branch; or for True: most steps
            inner = inner[-1:]
        for counted in inner:
            repeats = equation.params['length'] if name == 'scan' else 1
            total.update({key: repeats * value for key, value in counted.items()})
    return total


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    """The programs inside an equation; of a function with a custom gradient, the function's."""
    found = []
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(part, ClosedJaxpr):
                found.append(part.jaxpr)
            elif isinstance(part, Jaxpr):
                found.append(part)
    return found


def _product_flops(equation: Any) -> int:
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params['dimension_numbers']
    return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)


def _convolution_flops(equation: Any) -> int:
    kernel, spec = equation.invars[1].aval.shape, equation.params['dimension_numbers'].rhs_spec
    per_output = math.prod(kernel) // kernel[spec[0]]
    # The zeros that dilation inserts are not multiplied.
    dilation = math.prod(equation.params['lhs_dilation'])
    return 2 * equation.outvars[0].aval.size * per_output // dilation


def kept_bytes(config: ConfigDict) -> int:
    """Bytes that a micro-batch's forward pass keeps for the backward pass, without parameters.

    These are JAX's residuals. XLA may keep less and compute cheap ones again.
    """
    forward, variables, images = _forward(config)

    def residuals(params, batch_stats, crops):
        return jax.vjp(lambda params: forward(params, batch_stats, crops), params, has_aux=True)[1]

    crops = jax.eval_shape(lambda images: step.crops_of(config, images), images)
    batch_stats = variables.get('batch_stats', {})
    kept = jax.tree.leaves(jax.eval_shape(residuals, variables['params'], batch_stats, crops))
    return sum(map(_bytes, kept)) - tree_bytes(variables['params'])


def forward_flops(config: ConfigDict) -> int:
    """FLOPs of a micro-batch's forward pass, with the cutting of its crops."""
    forward, variables, images = _forward(config)

    def of_images(params, batch_stats, images):
        return forward(params, batch_stats, step.crops_of(config, images))

    counted = cost(of_images, variables['params'], variables.get('batch_stats', {}), images)
    return counted['flops']


def _forward(config: ConfigDict) -> tuple[Callable, Any, dict[str, jax.ShapeDtypeStruct]]:
    """`step.forward` as a function of parameters, statistics and crops; shapes to call it with."""
    channels = config.data.channels
    net = models.build(config.model, channels=channels, dtype=jnp.dtype(config.precision))
    side = max(config.data.size_crops)
    variables = jax.eval_shape(
        lambda: net.init(jax.random.key(0), [jnp.zeros((1, side, side, channels))], train=True)
    )
    images = batch_shapes(config, config.data.batchsize_per_replica)
    return functools.partial(step.forward, net, config), variables, images


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(map(_bytes, jax.tree.leaves(tree)))


def share_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of one device's share of all arrays of a tree, given a tree of shardings."""
    shapes = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(sharding.shard_shape(x.shape), x.dtype),
        tree,
        shardings,
    )
    return tree_bytes(shapes)


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
