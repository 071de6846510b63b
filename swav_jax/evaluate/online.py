"""kNN accuracy and NMI while a run goes on."""

import functools
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from swav_jax import models
from swav_jax.data import sources
from swav_jax.errors import UserError
from swav_jax.evaluate import clusters, features, knn
from swav_jax.state import TrainState

Results = dict[str, float]


class OnlineEvaluation:
    """What the network has learned so far, on images that it does not train on.

    Images of `config.evaluate.train_source` vote on the labels of `config.evaluate.test_source`.
    Without these two there is nothing to measure, and the pictures show training images.
    """

    pictured = 2000  # images of the training data, where there is no test data

    def __init__(self, config: ConfigDict, net: models.SwAVNet, mesh: Mesh, workdir: Path):
        self.config, self.net, self.mesh = config, net, mesh
        train, test = config.evaluate.train_source, config.evaluate.test_source
        limit = 0 if test else self.pictured
        where = 'config.evaluate.{}_source'.format
        opened = functools.partial(
            sources.open_source, channels=config.data.channels, cache_dir=str(workdir)
        )
        self.test = opened(test or config.data.source, limit=limit, setting=where('test'))
        self.train = opened(train, setting=where('train')) if train and test else None
        for source in filter(None, (self.train, self.test if self.train else None)):
            if source.labels is None:
                raise UserError(
                    'config.evaluate.train_source and test_source need labelled images: name '
                    "folders of class folders, or set both to ''"
                )

    def run(self, state: TrainState) -> Results:
        """`knn_top1` in percent, and `nmi` of prototypes and labels; empty without labels."""
        if self.train is None:
            return {}
        test = self.look(state, self.test)
        top1 = knn.accuracy(
            self.look(state, self.train).trunk,
            self.train.labels,
            test.trunk,
            self.test.labels,
            k=self.config.evaluate.k,
            temperature=self.config.evaluate.temperature,
        )
        nmi = clusters.nmi(self.test.labels, clusters.assign(test.scores[0]))
        return {'knn_top1': top1, 'nmi': nmi}

    def look(self, state: TrainState, source: sources.Source) -> features.Features:
        """Features of all images of a source."""
        variables = {'params': state.params, 'batch_stats': state.batch_stats}
        return features.extract(self.net, variables, source, self.config, self.mesh)
