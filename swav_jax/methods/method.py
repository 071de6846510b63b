"""The interface of a method: what the step, the layout, the plan and the loop know of it."""

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

# Letters, as in the methods: V crops of B images, of which A get codes; K_h prototypes of head h, D
# dimensions. Arrays within a step are one replica's share of the batch.


class Outputs(NamedTuple):
    """What the network says of crops."""

    embeddings: jax.Array  # (V, B, D)
    scores: tuple[jax.Array, ...]  # for each prototype head, (V, B, K_h)


class Network(NamedTuple):
    """The network as functions of parameters, so that a method may use others than the learned."""

    forward: Callable  # (params, batch_stats, crops) → Outputs, and the new batch_stats
    score: Callable  # (params, embeddings (..., D)) → for each head, scores (..., K_h)


class Batch(NamedTuple):
    """One replica's share of what a step learns from."""

    step: jax.Array  # () int32, steps done before this one
    crops: list[jax.Array]  # for each group of crops, (n_g, B, S_g, S_g, channels)
    weights: jax.Array  # (B,) 1, or 0 for an image that must not count


class Learned(NamedTuple):
    """What a method makes of a batch."""

    loss: jax.Array  # () this replica's; the mean over replicas is the loss of the global batch
    codes: list[jax.Array]  # for each head, (A, B, K_h): what the scores should have been
    state: Any  # the method's, after this step


class Method(abc.ABC):
    """What is learned, made from the run's settings. It keeps no arrays: those are in its state.

    Parameters that it is given are whole, whatever `config.sharding` is, so a copy of them in its
    state (a teacher) has the same shapes; `specs` says how that copy is split.

    Args:
      config: the run's settings.

    Attributes:
      fixed: settings that give the method's state its meaning, as 'loss.queue'. A run keeps them.
      remedy: what helps against a collapse, as an imperative with the settings' names.
    """

    fixed: tuple[str, ...] = ()
    remedy: str

    @abc.abstractmethod
    def __init__(self, config: Any): ...

    @abc.abstractmethod
    def check(self) -> None:
        """Check the method's settings; every command calls it after `config.validate`.

        Raises:
          UserError: naming a setting that cannot work.
        """

    @abc.abstractmethod
    def check_run(self, sizes: Any) -> None:
        """Check what training needs beyond sound settings: the size of the batch, float64.

        Args:
          sizes: the run's numbers, `config.Sizes`.

        Raises:
          UserError: naming a setting that cannot work.
        """

    @abc.abstractmethod
    def init(self, params: Any, batch_stats: Any, sizes: Any) -> tuple[Any, Any]:
        """What a run starts from; to be traced.

        Args:
          params, batch_stats: of the network, random or loaded.
          sizes: the run's numbers, `config.Sizes`.

        Returns:
          The parameters as the method wants them, and its own state: a NamedTuple of arrays.
        """

    @abc.abstractmethod
    def specs(self, state: Any) -> Any:
        """How each array of its state is split over the mesh.

        Args:
          state: the method's state or its shapes.

        Returns:
          A tree like the state, of PartitionSpecs.
        """

    @abc.abstractmethod
    def loss(
        self, network: Network, params: Any, outputs: Outputs, batch: Batch, state: Any
    ) -> Learned:
        """One replica's loss, inside `shard_map`; the step differentiates it by `params`.

        Args:
          network: the network's functions.
          params: what the network learns, whole.
          outputs: what it says of the batch's crops with these.
          batch: the crops, and more.
          state: this replica's share of the method's state.
        """

    @abc.abstractmethod
    def health(
        self, outputs: Outputs, learned: Learned, weights: jax.Array
    ) -> dict[str, jax.Array]:
        """Metrics of the global batch, inside `shard_map`, in one all-reduce.

        Returns:
          Scalars, the same on all replicas; `loss` and `bad_images` (of weight 0) are among them.
        """

    @abc.abstractmethod
    def after_update(self, params: Any, state: Any) -> tuple[Any, Any]:
        """Parameters and the method's state after the optimizer's update, outside `shard_map`."""

    @abc.abstractmethod
    def sign_of_collapse(self, row: Mapping[str, Any]) -> str | None:
        """What in a row of metrics.jsonl says that nothing is told apart, or None."""

    @abc.abstractmethod
    def plan(self, sizes: Any) -> Iterator[tuple[str, str]]:
        """Lines of `--plan`: labels and what stands behind them."""

    @abc.abstractmethod
    def warnings(self, sizes: Any) -> Iterator[str]:
        """What will probably go wrong, and what helps, for `--plan`."""

    @abc.abstractmethod
    def notes(self, sizes: Any) -> Iterator[str]:
        """What a run says at its start of settings that do not count as they stand."""
