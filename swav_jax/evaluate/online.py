"""kNN accuracy and NMI while a run goes on."""

from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from swav_jax import models
from swav_jax.data import sources
from swav_jax.errors import UserError
from swav_jax.evaluate import clusters, extraction, knn, labelled
from swav_jax.state import TrainState

Results = dict[str, float]


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
        self.pair, self.notes, self._said = None, (), set()
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
            knn.check(config.evaluate.k, len(self.pair.train))

    def run(self, state: TrainState, say: Callable[[str], None] = print) -> Results:
        """`knn_top1` in percent, and `nmi` of prototypes and labels; empty without labels.

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
            say(f'no kNN accuracy and no NMI: the network makes {", ".join(bad)} not finite')
            return {}
        rows = self.pair.rows[test.readable[self.pair.rows]]
        voters = train.readable
        top1 = knn.accuracy(
            train.trunk[voters],
            self.pair.train.labels[voters],
            test.trunk[rows],
            self.pair.test.labels[test.readable[self.pair.rows]],
            k=self.config.evaluate.k,
            temperature=self.config.evaluate.temperature,
        )
        known = test.readable & (self.test.labels >= 0)
        nmi = clusters.nmi(self.test.labels[known], clusters.assign(test.scores[0][known]))
        return {'knn_top1': top1, 'nmi': nmi}

    def _say_once(self, line: str, say: Callable[[str], None]) -> None:
        if line not in self._said and jax.process_index() == 0:
            say(line)
        self._said.add(line)

    def look(self, state: TrainState, source: sources.Source) -> extraction.Features:
        """Features of all images of a source."""
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        return extraction.extract(self.net, variables, source, self.config, self.mesh)
