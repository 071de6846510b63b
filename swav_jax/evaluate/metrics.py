"""How the numbers of a run are shown: titles, formats, and which values are better.

This module imports neither JAX nor TensorFlow, so that a page of finished runs takes no time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from swav_jax.runs.results import UNTRAINED, WITHOUT_TRAINING, without_end


@dataclass(frozen=True)
class Metric:
    """How the pages show a number of an online evaluation.

    Attributes:
      title: title of its curve.
      tile: text below the last value.
      form: format of that value.
      larger_is_better: None if that is unknown.
    """

    title: str
    tile: str
    form: str = '{:.3g}'
    larger_is_better: bool | None = True

    def without_training(self, name: str, results: Mapping[str, float | None]) -> list[str]:
        """What was reached without training, as '75.3% untrained', where `results` have it."""
        found = ((what, results.get(f'{name}{end}')) for end, what in WITHOUT_TRAINING.items())
        return [f'{self.form.format(value)} {what}' for what, value in found if value is not None]


METRICS = {  # of online evaluations, by the names in events.jsonl
    'knn_top1': Metric('kNN top-1, percent', 'kNN top-1', '{:.1f}%'),
    'linear_top1': Metric('Linear probe, percent', 'linear probe', '{:.1f}%'),
    'nmi': Metric('NMI', 'NMI of prototypes and labels', '{:.3f}'),
    'rankme': Metric('RankMe of the features', 'RankMe of the features', '{:.0f}'),
    'rankme_embeddings': Metric('RankMe of the embeddings', 'RankMe of the embeddings', '{:.0f}'),
    'alignment': Metric('Alignment: distance² of two crops', 'alignment', '{:.2f}', None),
    'uniformity': Metric('Uniformity: 0 is one point', 'uniformity', '{:.2f}', None),
    'prototypes_in_use': Metric('Prototypes in use, of all images', 'prototypes in use', '{:.0f}'),
    'prototypes_empty': Metric(
        'Prototypes without an image', 'prototypes without an image', '{:.0f}', False
    ),
    'prototypes_near_duplicates': Metric(
        'Prototypes with a near duplicate', 'prototypes with a near duplicate', '{:.0f}', False
    ),
}

CURVES = {  # titles by the names in metrics.jsonl
    'loss': 'Loss',
    'lr': 'Learning rate',
    'code_entropy': 'Entropy of the codes',
    'active_prototypes': 'Prototypes in use, in a batch',
    'largest_prototype_share': 'Share of the largest prototype',
    'embedding_std': 'Spread of the embeddings',
    'grad_norm': 'Norm of the gradient',
    'update_norm': 'Norm of the update',
    'images_per_second': 'Images a second',
    'data_wait': 'Seconds a step waits for data',
}


def measured(events: Iterable[Mapping[str, Any]]) -> dict[str, Metric]:
    """All numbers of online evaluations: those in events.jsonl, and those of this version."""
    names = {without_end(name) for row in events for name in row}
    others = sorted(names - METRICS.keys() - {'step', 'epoch'})
    return METRICS | {name: Metric(name, name, larger_is_better=None) for name in others}


def with_untrained(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of events.jsonl in which the untrained network's numbers have the usual names."""
    return [{name.removesuffix(UNTRAINED): x for name, x in row.items()} for row in events]
