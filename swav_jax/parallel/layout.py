"""How the state of a run lies on the mesh.

With `config.sharding='replicated'` every device holds all of it, except what the method splits (a
queue). With `'zero'` each device holds a slice of every parameter and of the optimizer's state
(ZeRO, Rajbhandari et al. 2020, 1910.02054): a step gathers the parameters, and gives each device
its slice of the averaged gradient. Methods, checkpoints and evaluations see full shapes only.

A method's state that is split like the batch is in the order of the replicas in a checkpoint, and
in that of the devices in a step: see replicas.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from swav_jax.parallel.mesh import AXES, REPLICATED
from swav_jax.parallel.replicas import to_devices, to_replicas


class Layout:
    """How the arrays of a `state.TrainState` are split over a mesh.

    Args:
      mesh: with the axes ('group', 'member'); an abstract one is enough for tracing.
      shapes: the whole state, or its shapes.
      sharding: `config.sharding`.
      method: the PartitionSpecs of the method's state, see `Method.specs`.
      micro_batches: `config.train.micro_batches`.

    Attributes:
      mesh: the mesh.
      specs: a PartitionSpec for each array of a state.
      shardings: the same as shardings on the mesh.
    """

    def __init__(
        self,
        mesh: Mesh | AbstractMesh,
        shapes: Any,
        sharding: str,
        method: Any,
        micro_batches: int = 1,
    ):
        self.mesh = mesh
        self._zero, self._turns = sharding == 'zero', (mesh.size, micro_batches)
        self._shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
        self.specs = jax.tree.map(lambda _: REPLICATED, shapes).replace(method=method)
        if self._zero:
            split = jax.tree.map(_spec, (shapes.params, shapes.opt_state))
            self.specs = self.specs.replace(params=split[0], opt_state=split[1])
        self.shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs)
        whole = self.specs.replace(params=REPLICATED, opt_state=REPLICATED)
        self._whole = jax.tree.map(lambda spec: NamedSharding(mesh, spec), whole)
        self._spread = jax.jit(self.pad, out_shardings=self.shardings)
        self._gather = jax.jit(self._cut, out_shardings=self._whole)
        self._gather_method = jax.jit(self._to_replicas, out_shardings=self._whole.method)

    def pad(self, state: Any) -> Any:
        """Pad the arrays of a whole state with zeros to lengths that the devices divide.

        The method's state is brought into the order of the devices.
        """
        opt_state = jax.tree.map(self._pad, state.opt_state) if self._zero else state.opt_state
        method = jax.tree.map(
            lambda x, spec: to_devices(x, spec, *self._turns), state.method, self.specs.method
        )
        return state.replace(
            params=self.pad_params(state.params), opt_state=opt_state, method=method
        )

    def pad_params(self, params: Any) -> Any:
        """Pad whole parameters like `pad`."""
        return jax.tree.map(self._pad, params) if self._zero else params

    def cut_params(self, params: Any) -> Any:
        """Undo `pad_params`; each device keeps its slice."""
        return jax.tree.map(_cut, params, self._shapes.params) if self._zero else params

    def spread(self, state: Any) -> Any:
        """Pad a whole state and split it over the mesh."""
        return self._spread(state)

    def gather(self, state: Any) -> Any:
        """Undo `spread`: parameters and the optimizer's state are whole on every device."""
        if self._zero:
            return self._gather(state)
        if 1 in self._turns or not any(AXES in spec for spec in jax.tree.leaves(self.specs.method)):
            return state
        return state.replace(method=self._gather_method(state.method))

    def whole(self) -> Any:
        """Shapes and shardings of the state that `gather` returns."""
        shardings = jax.tree.broadcast(self._whole, self._shapes)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self._shapes,
            shardings,
        )

    def own(self, params: Any) -> Any:
        """Inside `shard_map`: the whole parameters, cast to vary over devices.

        Their gradient is that of the device's own loss. Without the cast `shard_map` would sum
        gradients itself, in the compute dtype.
        """
        if not self._zero:
            return lax.pcast(params, AXES, to='varying')

        def gather(x, whole):
            if not whole.shape:
                return lax.pcast(x, AXES, to='varying')
            axis = _split_axis(whole.shape)
            full = lax.all_gather(x, AXES, axis=axis, tiled=True)
            return lax.slice_in_dim(full, 0, whole.shape[axis], axis=axis)

        return jax.tree.map(gather, params, self._shapes.params)

    def average(self, grads: Any) -> Any:
        """Inside `shard_map`: the mean of gradients over devices; with 'zero', this one's slice.

        float32 gradients are averaged in float32, by an all-reduce or a reduce-scatter.
        """

        def scatter(g):
            if not g.shape:
                return lax.pmean(g, AXES)
            axis = _split_axis(g.shape)
            total = lax.psum_scatter(self._pad(g), AXES, scatter_dimension=axis, tiled=True)
            return total / lax.axis_size(AXES)

        with jax.named_scope('average_gradients'):
            return jax.tree.map(scatter, grads) if self._zero else lax.pmean(grads, AXES)

    def _pad(self, x: jax.Array) -> jax.Array:
        if not x.shape:
            return x
        axis = _split_axis(x.shape)
        missing = -x.shape[axis] % math.prod(self.mesh.shape.values())
        return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

    def _cut(self, state: Any) -> Any:
        opt_state = jax.tree.map(_cut, state.opt_state, self._shapes.opt_state)
        return state.replace(
            params=self.cut_params(state.params),
            opt_state=opt_state,
            method=self._to_replicas(state.method),
        )

    def _to_replicas(self, method: Any) -> Any:
        return jax.tree.map(
            lambda x, spec: to_replicas(x, spec, *self._turns), method, self.specs.method
        )


def _cut(x: jax.Array, whole: Any) -> jax.Array:
    return x[tuple(slice(size) for size in whole.shape)]


def _split_axis(shape: tuple[int, ...]) -> int:
    """The longest axis, whose padding costs least; the last one if several are as long."""
    return max(range(len(shape)), key=lambda axis: (shape[axis], axis))


def _spec(x: Any) -> P:
    if not x.shape:
        return REPLICATED
    axis = _split_axis(x.shape)
    return P(*(AXES if i == axis else None for i in range(len(x.shape))))
