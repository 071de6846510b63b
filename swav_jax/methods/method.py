"""The interface between a method and the step, the layout, the plan and the training loop."""

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

# Letters, as in the methods: V crops of B images, of which A get codes; K_h prototypes of head h, D
# dimensions. Arrays within a step are one device's share of the batch, all its micro-batches.


class Outputs(NamedTuple):
    """Outputs of the network for crops."""

    embeddings: jax.Array  # (V, B, D)
    scores: tuple[jax.Array, ...]  # for each prototype head, (V, B, K_h)


class Network(NamedTuple):
    """The network as functions of parameters, so that a method can apply other parameters, too."""

    # (params, batch_stats, crops=None, train=True) → Outputs of these crops (indices, None: all),
    # new batch_stats
    forward: Callable
    score: Callable  # (params, embeddings (..., D)) → for each head, scores (..., K_h)


class Batch(NamedTuple):
    """One device's share of a batch."""

    step: jax.Array  # () int32, steps done before this one
    weights: jax.Array  # (B,) 1, or 0 for an image that must not count
    index: jax.Array | None  # (B,) int32, the images' numbers in the data
    batch_stats: Any  # of the network after this batch's forward pass


class Learned(NamedTuple):
    """Result of `Method.loss`."""

    loss: jax.Array  # () this device's; the mean over devices is the loss of the global batch
    codes: list[jax.Array]  # for each head, (A, B, K_h): the targets of the scores
    state: Any  # the method's state after this step


class Method(abc.ABC):
    """What a run learns. A method holds no arrays: they are in its state, which the step passes.

    A method with an encoder of its own (`config.evaluate.encoder`) has that one's variables in the
    fields `params` and `batch_stats` of its state.

    Its functions get parameters in their full shapes, whatever `config.sharding` is, so a copy of
    them in its state (a teacher) has the same shapes; `specs` says how that copy is split.

    Args:
      config: the run's settings.

    Attributes:
      fixed: settings that give the method's state its meaning, as 'loss.queue'. A run keeps them.
      remedy: advice against a collapse, in the imperative, with the names of settings.
      fills: whether `fill` sees an epoch of images before the first step.
    """

    fixed: tuple[str, ...] = ()
    remedy: str
    fills: bool = False

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
        """Return the parameters and the method's state before the first step; traced by jit.

        Args:
          params, batch_stats: of the network, random or loaded.
          sizes: the run's numbers, `config.Sizes`.

        Returns:
          The parameters, and the method's state: a NamedTuple of arrays.
        """

    @abc.abstractmethod
    def specs(self, state: Any) -> Any:
        """Return a PartitionSpec for each array of the method's state, which may be shapes."""

    def fill(self, network: Network, params: Any, batch: Batch, state: Any) -> tuple[Any, Any]:
        """See a batch before the first step, without gradients, inside `shard_map`; if it `fills`.

        Args:
          network: the network's functions.
          params: its first parameters.
          batch: this device's; its `step` counts these batches.
          state: this device's share of the method's state.

        Returns:
          BatchNorm's running statistics and the method's state after this batch.
        """
        raise NotImplementedError

    def before_step(self, step: jax.Array, params: Any, state: Any, mesh: Mesh) -> Any:
        """Return the method's state with which a step begins, outside `shard_map`.

        Args:
          step: () int32, steps done before.
          params: of the network, as its forward pass will use them.
          state: after the last step.
          mesh: the devices.
        """
        return state

    @abc.abstractmethod
    def loss(
        self, network: Network, params: Any, outputs: Outputs, batch: Batch, state: Any
    ) -> Learned:
        """One device's loss, inside `shard_map`; the step differentiates it by `params`.

        Args:
          network: the network's functions.
          params: the parameters that are learned.
          outputs: of the network with these parameters, for the batch's crops.
          batch: this device's.
          state: this device's share of the method's state.
        """

    @abc.abstractmethod
    def health(
        self, outputs: Outputs, learned: Learned, weights: jax.Array
    ) -> dict[str, jax.Array]:
        """Metrics of the global batch, inside `shard_map`, in one all-reduce.

        Returns:
          Scalars, equal on all devices, among them `loss` and `bad_images`.
        """

    @abc.abstractmethod
    def after_update(self, params: Any, state: Any) -> tuple[Any, Any]:
        """Return parameters and state after the optimizer's update, outside `shard_map`."""

    @abc.abstractmethod
    def sign_of_collapse(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """Look for a sign of collapse in a row of metrics.jsonl.

        Returns:
          What the row shows, and the heading of docs/learning.md that explains it; or None.
        """

    @abc.abstractmethod
    def plan(self, sizes: Any) -> Iterator[tuple[str, str]]:
        """Lines of `--plan`: label and text."""

    @abc.abstractmethod
    def warnings(self, sizes: Any) -> Iterator[str]:
        """Warnings of `--plan`: what will probably go wrong, and what helps."""

    @abc.abstractmethod
    def notes(self, sizes: Any) -> Iterator[str]:
        """Lines at the start of a run, about settings that are not used as they are."""
