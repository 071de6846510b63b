"""What a run measures while it goes on, on images that it does not train on.

An evaluation is a class like `KNN` and its name in `EVALUATIONS`. What it measures goes to
events.jsonl, to summary.json and to the report, which take the names from it.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from swav_jax import models
from swav_jax.data import sources
from swav_jax.errors import UserError
from swav_jax.evaluate import clusters, extraction, knn, labelled
from swav_jax.state import TrainState

Results = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """How the report shows a number.

    Attributes:
      title: of its curve.
      tile: what stands beneath the last value.
      form: format of that value.
    """

    title: str
    tile: str
    form: str = '{:.3g}'


@dataclass(frozen=True)
class Seen:
    """A network and what it makes of labelled images.

    Attributes:
      state: the network.
      pair: the images to learn from and those of their classes to test on.
      train: features of `pair.train`.
      test: features of all images of the test source; `pair.rows` are those of `pair.test`.
    """

    state: TrainState
    pair: labelled.Pair
    train: extraction.Features
    test: extraction.Features


class Evaluation(abc.ABC):
    """One way to judge a network, opened once for a run.

    Attributes:
      name: what messages call it.
      metrics: all that `run` can measure, and how the report shows it.

    Raises:
      UserError: it cannot be done with these settings or images.
    """

    name: str
    metrics: Mapping[str, Metric]

    def __init__(self, config: ConfigDict, pair: labelled.Pair):
        self.config = config

    @abc.abstractmethod
    def run(self, seen: Seen) -> Results:
        """The numbers by their names."""


class KNN(Evaluation):
    """Top-1 accuracy, in percent, of the nearest neighbours' votes."""

    name = 'kNN accuracy'
    metrics = MappingProxyType({'knn_top1': Metric('kNN top-1, percent', 'kNN top-1', '{:.1f}%')})

    def __init__(self, config: ConfigDict, pair: labelled.Pair):
        super().__init__(config, pair)
        knn.check(config.evaluate.k, len(pair.train))

    def run(self, seen: Seen) -> Results:
        """Of the test images whose class the training images have."""
        voters, judged = seen.train.readable, seen.test.readable[seen.pair.rows]
        top1 = knn.accuracy(
            seen.train.trunk[voters],
            seen.pair.train.labels[voters],
            seen.test.trunk[seen.pair.rows[judged]],
            seen.pair.test.labels[judged],
            k=self.config.evaluate.k,
            temperature=self.config.evaluate.temperature,
        )
        return {'knn_top1': top1}


class PrototypeNMI(Evaluation):
    """Normalised mutual information of the first head's nearest prototypes and the labels."""

    name = 'NMI'
    metrics = MappingProxyType({'nmi': Metric('NMI', 'NMI of prototypes and labels', '{:.3f}')})

    def run(self, seen: Seen) -> Results:
        """Of all labelled test images."""
        test = seen.test
        known = test.readable & (test.labels >= 0)
        return {'nmi': clusters.nmi(test.labels[known], clusters.assign(test.scores[0][known]))}


EVALUATIONS = (KNN, PrototypeNMI)
METRICS = {name: metric for kind in EVALUATIONS for name, metric in kind.metrics.items()}


class OnlineEvaluation:
    """What the network has learned so far, on images that it does not train on.

    Images of `config.evaluate.train_source` vote on the labels of `config.evaluate.test_source`,
    whose classes are matched by name. Without these two there is nothing to measure, and the
    pictures show images of the test source or, without one, training images.

    Attributes:
      test: the images to show.
      notes: lines for the user on what does not count.

    Raises:
      UserError: one of the sources cannot be opened, or the two cannot be matched.
    """

    pictured = 2000  # images of the training data, where there is no test data

    def __init__(self, config: ConfigDict, net: models.SwAVNet, mesh: Mesh, workdir: Path):
        self.config, self.net, self.mesh = config, net, mesh
        self.pair, self.evaluations, self.notes, self._said = None, [], (), set()
        specs = {name: config.evaluate[f'{name}_source'] for name in ('train', 'test')}
        if specs['train'] and not specs['test']:
            raise UserError(
                f'config.evaluate.train_source={specs["train"]!r} needs images to vote on: name '
                "some as config.evaluate.test_source, or set train_source to ''"
            )

        def open_source(spec: str, name: str, limit: int = 0) -> sources.Source:
            setting = f'config.evaluate.{name}_source'
            source = sources.open_source(
                spec,
                limit=limit,
                channels=config.data.channels,
                cache_dir=str(workdir),
                setting=setting,
            )
            if specs[name]:  # training itself says those of its images
                self.notes += tuple(f'{setting}: {note}' for note in source.notes)
            return source

        limit = 0 if specs['test'] else self.pictured
        self.test = open_source(specs['test'] or config.data.source, 'test', limit)
        if specs['train']:
            train = open_source(specs['train'], 'train')
            names = [f'config.evaluate.{name}_source={spec}' for name, spec in specs.items()]
            self.pair = labelled.pair(train, self.test, names)
            self.notes += self.pair.notes
            self.evaluations = [kind(config, self.pair) for kind in EVALUATIONS]

    def run(self, state: TrainState, say: Callable[[str], None] = print) -> Results:
        """All that `EVALUATIONS` measure; empty without labels.

        Images that cannot be read do not count.

        Args:
          state: the network.
          say: prints a line for the user.

        Raises:
          UserError: more images cannot be read than `config.data.max_bad_fraction` allows.
        """
        if self.pair is None:
            return {}
        train, test = self.look(state, self.pair.train), self.look(state, self.test)
        for source, found in ((self.pair.train, train), (self.test, test)):
            for line in extraction.check_readable(
                found.readable, source, self.config.data.max_bad_fraction
            ):
                self._say_once(line, say)
        if bad := extraction.not_finite(train) + extraction.not_finite(test):
            no = ' and '.join(f'no {evaluation.name}' for evaluation in self.evaluations)
            say(f'{no}: the network makes {", ".join(bad)} not finite')
            return {}
        seen = Seen(state, self.pair, train, test)
        return {
            name: value
            for evaluation in self.evaluations
            for name, value in evaluation.run(seen).items()
        }

    def _say_once(self, line: str, say: Callable[[str], None]) -> None:
        if line not in self._said and jax.process_index() == 0:
            say(line)
        self._said.add(line)

    def look(self, state: TrainState, source: sources.Source) -> extraction.Features:
        """Features of all images of a source."""
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        return extraction.extract(self.net, variables, source, self.config, self.mesh)
