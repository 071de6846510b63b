"""Evaluations during a run, on images that it does not train on.

An evaluation is a class like `KNN`, listed by name in `EVALUATIONS`; `config.evaluate.online` names
those of a run. Its numbers are written to events.jsonl and summary.json and shown in the report,
under the names that it gives them.
"""

import abc
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from swav_jax import models
from swav_jax.data import sources
from swav_jax.errors import UserError
from swav_jax.evaluate import clusters, extraction, gallery, geometry, knn, labelled, logistic
from swav_jax.models.head import prototype_scores
from swav_jax.runs.results import PIXELS
from swav_jax.state import TrainState

PICTURED = 2000  # images to show if no test images are named
_PAIRED = 256  # images of which two crops are compared

Results = dict[str, float]


@dataclass(frozen=True)
class Seen:
    """What evaluations judge.

    Attributes:
      test: features of the test source, or of some of the training images if there is none.
      train: features of `pair.train`; None without labels.
      pair: labelled images to learn from, and those of their classes to test on, which are
        `pair.rows` of `test`; None without labels.
      prototypes: (K, D) for each prototype head.
      crops: returns embeddings (2, N, D) of two training crops of some images; None if the settings
        have only one of the largest size, or none of these images can be read.
    """

    test: extraction.Features
    train: extraction.Features | None = None
    pair: labelled.Pair | None = None
    prototypes: tuple[np.ndarray, ...] = ()
    crops: Callable[[], np.ndarray | None] = lambda: None

    def labelled(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Trunk features and labels to learn from, then those to test on; all are readable."""
        voters, judged = self.train.readable, self.test.readable[self.pair.rows]
        return (
            self.train.trunk[voters],
            self.pair.train.labels[voters],
            self.test.trunk[self.pair.rows[judged]],
            self.pair.test.labels[judged],
        )


class Evaluation(abc.ABC):
    """One way to judge a network, made once per run.

    Attributes:
      name: for messages.
      metrics: names of all numbers that `run` can return; `evaluate.metrics` has their titles.
      of_train, of_test: what it reads of the head, see `extraction.extract`.
      needs_labels: whether it reads `Seen.pair`.
      judges_trunk: whether it reads `Seen.labelled` alone, so that it can judge pixels, too.

    Raises:
      UserError: it cannot be done with these settings or images.
    """

    name: str
    metrics: tuple[str, ...]
    of_train: tuple[str, ...] = ()
    of_test: tuple[str, ...] = ()
    needs_labels: bool = False
    judges_trunk: bool = False

    def __init__(self, config: ConfigDict, pair: labelled.Pair | None):
        self.config = config

    @abc.abstractmethod
    def run(self, seen: Seen) -> Results:
        """Compute the numbers, by name."""


class KNN(Evaluation):
    """Top-1 accuracy in percent of the votes of the nearest neighbours."""

    name = 'kNN accuracy'
    metrics = ('knn_top1',)
    needs_labels = judges_trunk = True

    def __init__(self, config: ConfigDict, pair: labelled.Pair):
        super().__init__(config, pair)
        knn.check(config.evaluate.k, len(pair.train))

    def run(self, seen: Seen) -> Results:
        """Judge the test images whose class the training images have."""
        k, temperature = self.config.evaluate.k, self.config.evaluate.temperature
        return {'knn_top1': knn.accuracy(*seen.labelled(), k=k, temperature=temperature)}


class Linear(Evaluation):
    """Top-1 accuracy in percent of a logistic regression on the standardised features."""

    name = 'linear accuracy'
    metrics = ('linear_top1',)
    needs_labels = judges_trunk = True

    def run(self, seen: Seen) -> Results:
        """Judge the test images whose class the training images have."""
        return {'linear_top1': logistic.accuracy(*seen.labelled())}


class PrototypeNMI(Evaluation):
    """Normalised mutual information of labels and nearest prototypes of the first head."""

    name = 'NMI'
    metrics = ('nmi',)
    of_test = ('nearest',)
    needs_labels = True

    def run(self, seen: Seen) -> Results:
        """Judge all labelled test images."""
        test = seen.test
        known = test.readable & (test.labels >= 0)
        return {'nmi': clusters.nmi(test.labels[known], test.nearest[0][known])}


class RankMe(Evaluation):
    """How many directions features and embeddings use."""

    name = 'RankMe'
    metrics = (
        'rankme',
        'rankme_embeddings',
    )
    of_test = ('embeddings',)

    def run(self, seen: Seen) -> Results:
        """Judge all test images."""
        features = {'rankme': seen.test.trunk, 'rankme_embeddings': seen.test.embeddings}
        readable = seen.test.readable
        return {name: geometry.effective_rank(x[readable]) for name, x in features.items()}


class AlignmentUniformity(Evaluation):
    """How close two crops of an image lie, and how evenly images spread."""

    name = 'alignment and uniformity'
    metrics = (
        'alignment',
        'uniformity',
    )
    of_test = ('embeddings',)

    def run(self, seen: Seen) -> Results:
        """Judge embeddings; one image has no uniformity, one large crop no alignment."""
        embeddings, found = seen.test.embeddings[seen.test.readable], {}
        if len(embeddings) > 1:
            found['uniformity'] = geometry.uniformity(embeddings)
        if (crops := seen.crops()) is not None:
            found['alignment'] = geometry.alignment(*crops)
        return found


class Prototypes(Evaluation):
    """Prototypes of the first head that images use, that none does, and that are alike.

    Those in use are nearest to a training image, with labels from `config.evaluate.train_source`:
    one that stays empty there was empty for an epoch.
    """

    name = 'prototypes in use'
    metrics = (
        'prototypes_in_use',
        'prototypes_empty',
        'prototypes_near_duplicates',
    )
    of_train = of_test = ('nearest',)

    def run(self, seen: Seen) -> Results:
        """Count the prototypes."""
        found = seen.test if seen.train is None else seen.train
        prototypes = seen.prototypes[0]
        used = len(np.unique(found.nearest[0][found.readable]))
        return {
            'prototypes_in_use': used,
            'prototypes_empty': len(prototypes) - used,
            'prototypes_near_duplicates': geometry.near_duplicates(prototypes),
        }


EVALUATIONS = {
    'knn': KNN,
    'linear': Linear,
    'nmi': PrototypeNMI,
    'rankme': RankMe,
    'alignment': AlignmentUniformity,
    'prototypes': Prototypes,
}


class OnlineEvaluation:
    """The evaluations of a run that `config.evaluate.online` names.

    Labelled images to learn from are `config.evaluate.train_source`, those to test on
    `config.evaluate.test_source`; their classes are matched by name. Without both, evaluations that
    need labels are left out, and the others judge some of the training images.

    Attributes:
      test: the images to show in the report; training images if there is no test source.
      notes: lines for the user on what does not count.

    Raises:
      UserError: a source cannot be opened, or the two cannot be matched.
    """

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
        chosen = (EVALUATIONS[name] for name in dict.fromkeys(config.evaluate.online))
        self.evaluations = [
            kind(config, self.pair) for kind in chosen if self.pair or not kind.needs_labels
        ]

    def run(self, state: TrainState, say: Callable[[str], None] = print) -> Results:
        """Evaluate a network; returns all numbers by name.

        Images that cannot be read do not count. `say` prints a line for the user.

        Raises:
          UserError: more images cannot be read than `config.data.max_bad_fraction` allows.
        """
        if not self.evaluations:
            return {}
        seen = Seen(
            test=self.look(state, self.test, self._of_head('of_test')),
            train=self._look_at_train(state),
            pair=self.pair,
            prototypes=_prototypes(state, self.config.evaluate.encoder),
            crops=functools.partial(self._embed_crops, state),
        )
        self._report_unreadable(seen, say)
        looked = [found for found in (seen.train, seen.test) if found is not None]
        if bad := [name for found in looked for name in extraction.not_finite(found)]:
            no = ' and '.join(f'no {evaluation.name}' for evaluation in self.evaluations)
            say(f'{no}: the network makes {", ".join(bad)} not finite')
            return {}
        return {k: x for evaluation in self.evaluations for k, x in evaluation.run(seen).items()}

    def run_on_pixels(self) -> Results:
        """Judge the pixels themselves like features of a trunk; their names end with `PIXELS`."""
        judges = [evaluation for evaluation in self.evaluations if evaluation.judges_trunk]
        if not judges:
            return {}
        train, test = (
            extraction.pixels(source, self.config, self.mesh)
            for source in (self.pair.train, self.test)
        )
        seen = Seen(test=test, train=train, pair=self.pair)
        return {f'{k}{PIXELS}': x for judge in judges for k, x in judge.run(seen).items()}

    def look(
        self,
        state: TrainState,
        source: sources.Source,
        of_head: Collection[str] = ('embeddings', 'scores'),
    ) -> extraction.Features:
        """Compute features of all images of a source; for `of_head` see `extraction.extract`."""
        variables = state.variables(self.config.evaluate.encoder)
        return extraction.extract(
            self.net, variables, source, self.config, self.mesh, of_head=of_head
        )

    def _look_at_train(self, state: TrainState) -> extraction.Features | None:
        if self.pair is None:
            return None
        return self.look(state, self.pair.train, self._of_head('of_train'))

    def _of_head(self, name: str) -> set[str]:
        return {part for evaluation in self.evaluations for part in getattr(evaluation, name)}

    def _report_unreadable(self, seen: Seen, say: Callable[[str], None]) -> None:
        looked = [(self.test, seen.test)]
        if self.pair is not None:
            looked.insert(0, (self.pair.train, seen.train))
        for source, found in looked:
            allowed = self.config.data.max_bad_fraction
            for line in extraction.check_readable(found.readable, source, allowed):
                if line not in self._said and jax.process_index() == 0:
                    say(line)
                self._said.add(line)

    def _embed_crops(self, state: TrainState) -> np.ndarray | None:
        data = self.config.data.copy_and_resolve_references().unlock()
        if data.num_crops[0] < 2:
            return None
        data.update(
            num_crops=(2,), size_crops=data.size_crops[:1], crop_scales=data.crop_scales[:1]
        )
        config = self.config.copy_and_resolve_references().unlock()
        config.data = data
        batch, crops = gallery.first_crops(self.test, config, images=min(_PAIRED, len(self.test)))
        readable = batch['weight'] > 0
        if not readable.any():
            return None
        variables = state.variables(self.config.evaluate.encoder)
        return np.stack([extraction.embed(self.net, variables, x)[readable] for x in crops])


def _prototypes(state: TrainState, encoder: str) -> tuple[np.ndarray, ...]:
    """The prototypes (K, D) of each head."""
    head = jax.tree.map(extraction.local, state.variables(encoder)['params']['head'])
    axes = jnp.eye(len(head['prototypes0']['kernel']))
    return tuple(np.asarray(scores).T for scores in prototype_scores(head, axes))
