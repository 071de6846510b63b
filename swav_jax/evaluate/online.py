"""Evaluations during a run, on images that it does not train on.

An evaluation is a class like `KNN`, listed in `EVALUATIONS`. Its numbers are written to
events.jsonl and summary.json and shown in the report, under the names that it gives them.
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

PICTURED = 2000  # images to show if no test images are named

Results = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """How the report shows a number.

    Attributes:
      title: title of its curve.
      tile: text below the last value.
      form: format of that value.
    """

    title: str
    tile: str
    form: str = '{:.3g}'


@dataclass(frozen=True)
class Seen:
    """Features of labelled images.

    Attributes:
      pair: the images to learn from, and those of their classes to test on.
      train: features of `pair.train`.
      test: features of all images of the test source; `pair.rows` are those of `pair.test`.
    """

    pair: labelled.Pair
    train: extraction.Features
    test: extraction.Features


class Evaluation(abc.ABC):
    """One way to judge a network, made once per run.

    Attributes:
      name: for messages.
      metrics: all numbers that `run` can return, and how the report shows them.

    Raises:
      UserError: it cannot be done with these settings or images.
    """

    name: str
    metrics: Mapping[str, Metric]

    def __init__(self, config: ConfigDict, pair: labelled.Pair):
        self.config = config

    @abc.abstractmethod
    def run(self, seen: Seen) -> Results:
        """Compute the numbers, by name."""


class KNN(Evaluation):
    """Top-1 accuracy in percent of the votes of the nearest neighbours."""

    name = 'kNN accuracy'
    metrics = MappingProxyType({'knn_top1': Metric('kNN top-1, percent', 'kNN top-1', '{:.1f}%')})

    def __init__(self, config: ConfigDict, pair: labelled.Pair):
        super().__init__(config, pair)
        knn.check(config.evaluate.k, len(pair.train))

    def run(self, seen: Seen) -> Results:
        """Judge the test images whose class the training images have."""
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
    """Normalised mutual information of labels and nearest prototypes of the first head."""

    name = 'NMI'
    metrics = MappingProxyType({'nmi': Metric('NMI', 'NMI of prototypes and labels', '{:.3f}')})

    def run(self, seen: Seen) -> Results:
        """Judge all labelled test images."""
        test = seen.test
        known = test.readable & (test.labels >= 0)
        return {'nmi': clusters.nmi(test.labels[known], clusters.assign(test.scores[0][known]))}


EVALUATIONS = (KNN, PrototypeNMI)
METRICS = {name: metric for kind in EVALUATIONS for name, metric in kind.metrics.items()}


class OnlineEvaluation:
    """All `EVALUATIONS` of a run, on the images of two labelled sources.

    These are `config.evaluate.train_source` to learn from and `config.evaluate.test_source` to test
    on; their classes are matched by name. Nothing is measured without both.

    Attributes:
      test: the images to show in the report; training images if there is no test source.
      notes: lines for the user on what does not count.

    Raises:
      UserError: a source cannot be opened, or the two cannot be matched.
    """

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
            if specs[name]:  # training reports the notes on its own images
                self.notes += tuple(f'{setting}: {note}' for note in source.notes)
            return source

        limit = 0 if specs['test'] else PICTURED
        self.test = open_source(specs['test'] or config.data.source, 'test', limit)
        if specs['train']:
            train = open_source(specs['train'], 'train')
            names = [f'config.evaluate.{name}_source={spec}' for name, spec in specs.items()]
            self.pair = labelled.pair(train, self.test, names)
            self.notes += self.pair.notes
            self.evaluations = [kind(config, self.pair) for kind in EVALUATIONS]

    def run(self, state: TrainState, say: Callable[[str], None] = print) -> Results:
        """Evaluate a network; returns all numbers by name, none without labels.

        Images that cannot be read do not count. `say` prints a line for the user.

        Raises:
          UserError: more images cannot be read than `config.data.max_bad_fraction` allows.
        """
        if self.pair is None:
            return {}
        train, test = self.look(state, self.pair.train), self.look(state, self.test)
        for source, found in ((self.pair.train, train), (self.test, test)):
            allowed = self.config.data.max_bad_fraction
            for line in extraction.check_readable(found.readable, source, allowed):
                if line not in self._said and jax.process_index() == 0:
                    say(line)
                self._said.add(line)
        if bad := extraction.not_finite(train) + extraction.not_finite(test):
            no = ' and '.join(f'no {evaluation.name}' for evaluation in self.evaluations)
            say(f'{no}: the network makes {", ".join(bad)} not finite')
            return {}
        results = {}
        for evaluation in self.evaluations:
            results |= evaluation.run(Seen(self.pair, train, test))
        return results

    def look(self, state: TrainState, source: sources.Source) -> extraction.Features:
        """Compute features of all images of a source."""
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        return extraction.extract(self.net, variables, source, self.config, self.mesh)
