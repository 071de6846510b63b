"""Signs of a run that goes wrong, in words; docs/learning.md explains each under its name.

The thresholds were tried on real runs on the embedded images (AdamW and SGD, 30 and 100 prototypes,
batches of 64 and 128), over the last tenth of the log:

    loss / ln K              good after an epoch: below 0.96; stuck: 0.989 to 1.002
    prototypes in a batch    of as many as at random, good: at least 42%; bad: 5% to 17%
    share of the largest     good: below 0.35; bad: 0.8 to 1
    spread, of its start     good: at least 63%; learning rate × 30: 1% to 39%
    entropy of codes / ln K  good: below 0.9; epsilon 0.5: 1.00

A threshold lies between the two, nearer to the bad runs: advice that is wrong costs more than
advice that is missing. A value is the median over the last rows, because one batch says little.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from swav_jax.config.settings import MOST_PROTOTYPES_PER_IMAGE
from swav_jax.runs.results import PIXELS

STUCK = 0.98  # of ln K: hardly better than telling no images apart
LEARNING = 0.95  # of ln K: some images are told apart
RISE = 0.03  # of ln K, by which a loss must rise to count
JUMP = 1.05  # of ln K: predictions that are confident and wrong
FEW = 0.25  # of the prototypes that a batch uses at random
LARGEST = 0.5  # of the images
SPREAD = 0.5  # of the spread at the start
EQUAL = 0.1  # of 1/√D, the spread in all directions
SOFT = 0.95  # of ln K
UNUSED = 0.1  # of all prototypes: a few without images, or alike, are usual
OVERFLOWS = 20, 0.05  # the scale starts 16 halvings above 1; later one overflow in 2,000 is usual
ENOUGH = 0.2  # of the run; an epoch is enough, too

NAMES = (  # causes before their effects
    'More prototypes than the batch can fill', 'Soft codes', 'Learning rate too high',
    'Loss rises after the freeze', 'Queue too early or too late', 'float16 overflows',
    'Stuck at ln K', 'Equal embeddings', 'Few prototypes', 'Empty prototypes', 'Near duplicates',
    'Nothing gained over pixels',
)  # fmt: skip

Row = Mapping[str, float]


class Finding(NamedTuple):
    """A sign.

    Attributes:
      name: one of `NAMES`, a heading of docs/learning.md.
      seen: the numbers that show it.
      change: what to change, by the names of settings.
    """

    name: str
    seen: str
    change: str


def findings(
    rows: Sequence[Row],
    events: Sequence[Row],
    summary: Row,
    config: Mapping[str, Any],
    batch: int | None = None,
) -> list[Finding]:
    """Return the signs that a run shows, in the order of `NAMES`.

    Args:
      rows, events: of metrics.jsonl and events.jsonl; names that a row lacks are not judged.
      summary: of summary.json, for values of raw pixels.
      config: of config.json.
      batch: images of a step, over all devices; None if not known.

    Raises:
      KeyError, TypeError, IndexError: `config` is not that of a run.
    """
    run = _Run(rows, events, summary, config, batch)
    found = [finding for sign in _SIGNS for finding in sign(run)]
    return sorted(found, key=lambda finding: NAMES.index(finding.name))


def is_long_enough(rows: Sequence[Row], config: Mapping[str, Any]) -> bool:
    """Whether a run of these rows and settings should have begun to learn."""
    return _Run(rows, (), {}, config, None).learned


def images_of_a_device(config: Mapping[str, Any]) -> int:
    """Images that a device has of each batch, from the settings of a run of any version."""
    turns = config.get('train', {}).get('micro_batches', 1)
    return turns * config['data']['batchsize_per_replica']


@dataclass(frozen=True)
class _Run:
    """What signs are read from; see `findings`."""

    rows: Sequence[Row]
    events: Sequence[Row]
    summary: Row
    config: Mapping[str, Any]
    batch: int | None

    @property
    def prototypes(self) -> int:
        return self.config['model']['head']['num_clusters'][0]

    @property
    def ln_k(self) -> float:
        return math.log(self.prototypes)

    @property
    def shares_equally(self) -> bool:
        """Whether the codes are Sinkhorn's, in which prototypes share the batch equally."""
        return self.config.get('method', 'swav') != 'deepcluster_v2'

    @property
    def sharper(self) -> str:
        """Advice for sharper codes, with a comma behind it; '' where clusters are the codes."""
        epsilon = self.config['loss']['epsilon']
        return f'lower config.loss.epsilon={epsilon:g}, ' if self.shares_equally else ''

    @property
    def frozen(self) -> int:
        """Steps during which the prototypes are frozen."""
        frozen = self.config['model']['temp_frozen_params_iter_map']
        return max((steps for _, steps in frozen), default=0)

    @property
    def learned(self) -> bool:
        """Whether the run is long enough that its loss should have fallen."""
        last = self.rows[-1] if self.rows else {}
        enough = min(1.0, ENOUGH * self.config['optimizer']['num_epochs'])
        return last.get('epoch', 0) >= enough and last.get('step', 0) > self.frozen

    @property
    def usual(self) -> float:
        """Prototypes that a batch uses if each image picks one at random."""
        images = self.batch or images_of_a_device(self.config)  # which is a lower bound
        return -self.prototypes * math.expm1(-images / self.prototypes)

    def points(self, name: str, first: float = 0, last: float = math.inf) -> list[tuple]:
        """Step and value of each row with steps from `first` to `last` that has both."""
        return [
            (row['step'], row[name])
            for row in self.rows
            if row.get('step') is not None
            and row.get(name) is not None
            and first <= row['step'] <= last
        ]

    def late(self, name: str) -> float | None:
        """Median over the last tenth of the rows, at least 5; None if no row has it."""
        values = [value for _, value in self.points(name)]
        return median(values[-max(5, len(values) // 10) :]) if values else None

    def lowest_loss(self) -> tuple[int, float]:
        """Step and value of the lowest loss / ln K, each the median of 5 rows."""
        points = self.points('loss_over_ln_k')
        smooth = [
            (points[i + 2][0], median(value for _, value in points[i : i + 5]))
            for i in range(len(points) - 4)
        ]
        return min(smooth, key=lambda point: point[1], default=(0, math.inf))

    def result(self, name: str) -> float | None:
        """The last value of an online evaluation."""
        values = [row[name] for row in self.events if row.get(name) is not None]
        return values[-1] if values else None


def _stuck(run: _Run) -> Iterator[Finding]:
    loss = run.late('loss_over_ln_k')
    if loss is not None and run.learned and loss > STUCK and run.lowest_loss()[1] > LEARNING:
        yield Finding(
            'Stuck at ln K',
            f'loss / ln K is {loss:.3f} after {run.rows[-1]["epoch"]:g} epochs; 1 means that all '
            'images look alike to the prototypes',
            f'{run.sharper}make the crops easier (config.data.crop_scales, config.augment), train '
            'for longer',
        )


def _prototypes(run: _Run) -> Iterator[Finding]:
    active, largest = run.late('active_prototypes'), run.late('largest_prototype_share')
    if not run.learned:
        return
    seen = []
    if active is not None and active < FEW * run.usual:
        seen.append(f'a batch uses {active:g} prototypes, and would use {run.usual:.0f} at random')
    if largest is not None and largest > LARGEST:
        seen.append(f'one prototype takes {largest:.0%} of the images')
    if seen:
        yield Finding(
            'Few prototypes',
            ', and '.join(seen),
            f'{run.sharper}lower the learning rate (config.optimizer.param_schedulers.lr)'
            + (
                f', and freeze the prototypes for longer than {run.frozen} steps '
                '(config.model.temp_frozen_params_iter_map)'
                if run.shares_equally
                else ', or use fewer clusters (config.model.head.num_clusters)'
            ),
        )


def _unused(run: _Run) -> Iterator[Finding]:
    for name, heading, seen in (
        ('prototypes_empty', 'Empty prototypes', 'are nearest to no image'),
        ('prototypes_near_duplicates', 'Near duplicates', 'are nearly the same as another one'),
    ):
        count = run.result(name)
        if count is not None and run.learned and count > UNUSED * run.prototypes:
            yield Finding(
                heading,
                f'{count:g} of {run.prototypes} prototypes {seen}',
                f'{run.sharper}or use fewer prototypes than '
                f'config.model.head.num_clusters={run.prototypes}'.removeprefix('or '),
            )


def _too_many(run: _Run) -> Iterator[Finding]:
    if run.batch is None or not run.shares_equally:
        return
    queue = run.config['loss']['queue']['queue_length'] // run.batch * run.batch
    samples, most = run.batch + queue, MOST_PROTOTYPES_PER_IMAGE
    if run.prototypes > most * samples:
        yield Finding(
            'More prototypes than the batch can fill',
            f'{samples:,} images (batch and queue) share {run.prototypes:,} prototypes in equal '
            f'parts, more than {most} for each image',
            f'use at most {most * samples:,} prototypes (config.model.head.num_clusters), a '
            'larger batch (config.train.micro_batches), or a queue '
            '(config.loss.queue.queue_length)',
        )


def _soft(run: _Run) -> Iterator[Finding]:
    entropy, loss = run.late('code_entropy'), run.config['loss']
    # Codes that are softer than the predictions pull these towards equal shares. With a sharper
    # epsilon, codes are only soft because the scores are alike: that is 'Stuck at ln K'.
    softer = loss['epsilon'] >= loss['temperature']
    if entropy is not None and softer and entropy > SOFT * run.ln_k:
        yield Finding(
            'Soft codes',
            f'the entropy of the codes is {entropy / run.ln_k:.0%} of ln K: an image belongs to '
            f'all prototypes, because epsilon ({loss["epsilon"]:g}) is not below the temperature '
            f'of the predictions ({loss["temperature"]:g})',
            f'set config.loss.epsilon={loss["temperature"] / 2:g} or lower',
        )


def _rate(run: _Run) -> Iterator[Finding]:
    spread = run.points('embedding_std')
    loss, (lowest_at, lowest) = run.late('loss_over_ln_k'), run.lowest_loss()
    active, largest = run.late('active_prototypes'), run.late('largest_prototype_share')
    seen = []
    if spread and run.learned:
        # The spread alone also falls in a run that is only stuck, but there many prototypes stay
        # in use.
        left = run.late('embedding_std') / max(spread[0][1], 1e-30)
        few = (active is not None and active < FEW * run.usual) or (largest or 0) > LARGEST
        if left < SPREAD and few:
            seen.append(
                f'the spread of the embeddings fell to {left:.0%} of its start while few '
                'prototypes are in use'
            )
    if loss is not None and lowest < LEARNING and lowest_at > run.frozen and loss > STUCK:
        seen.append(f'loss / ln K was {lowest:.3f} at step {lowest_at} and is {loss:.3f} now')
    half = [value for _, value in run.points('loss_over_ln_k', run.frozen + 1)]
    half = half[len(half) // 2 :]
    if half and run.learned and max(half) > JUMP:
        seen.append(f'loss / ln K jumps up to {max(half):.3f}, above that of a guess')
    if seen:
        scaling = run.config['optimizer']['param_schedulers']['lr'].get('auto_lr_scaling', {})
        name, value = 'config.optimizer.param_schedulers.lr', scaling.get('base_value')
        if value:
            name = f'{name}.auto_lr_scaling.base_value={value:g}'
        yield Finding(
            'Learning rate too high',
            ', and '.join(seen),
            f'lower the learning rate ({name}) to a third, then to a tenth',
        )


def _equal(run: _Run) -> Iterator[Finding]:
    spread, full = run.late('embedding_std'), 1 / math.sqrt(run.config['model']['head']['dims'][-1])
    if spread is not None and run.learned and spread < EQUAL * full:
        yield Finding(
            'Equal embeddings',
            f'the spread of the embeddings is {spread:.2g}, {spread / full:.0%} of that in all '
            'directions',
            'lower the learning rate (config.optimizer.param_schedulers.lr), make its warm-up '
            'longer (lengths)',
        )


def _freeze(run: _Run) -> Iterator[Finding]:
    loss, (lowest_at, lowest) = run.late('loss_over_ln_k'), run.lowest_loss()
    if (
        loss is not None
        and run.learned
        and run.shares_equally
        and 0 < lowest_at <= run.frozen
        and lowest < LEARNING
        and loss > lowest + RISE
    ):
        yield Finding(
            'Loss rises after the freeze',
            f'loss / ln K was {lowest:.3f} at step {lowest_at}, before the prototypes moved at '
            f'step {run.frozen}, and is {loss:.3f} now',
            'lower the learning rate (config.optimizer.param_schedulers.lr), or end the freeze '
            'after its warm-up (config.model.temp_frozen_params_iter_map)',
        )


def _queue(run: _Run) -> Iterator[Finding]:
    queue, loss = run.config['loss']['queue'], run.late('loss_over_ln_k')
    if not queue['queue_length'] or not run.batch or not run.rows:
        return
    full = queue['start_iter'] + queue['queue_length'] // run.batch
    last = run.rows[-1].get('step', 0)
    before = [value for _, value in run.points('loss_over_ln_k', last=full)][-5:]
    heading = 'Queue too early or too late'
    if run.learned and last <= full:
        yield Finding(
            heading,
            f'the queue is used from step {full:,} on, after the last step of the run, {last:,}',
            'lower config.loss.queue.start_iter or config.loss.queue.queue_length',
        )
    elif before and loss is not None and run.learned:
        then, active = median(before), run.late('active_prototypes')
        few = active is not None and active < FEW * run.usual
        if (then > STUCK and (loss > STUCK or few)) or loss > then + RISE:
            yield Finding(
                heading,
                f'loss / ln K was {then:.3f} when the queue came into use at step {full:,}, and is '
                f'{loss:.3f} now',
                f'raise config.loss.queue.start_iter={queue["start_iter"]} to a step at which the '
                'loss has fallen',
            )


def _overflows(run: _Run) -> Iterator[Finding]:
    count, (least, share) = run.points('overflows'), OVERFLOWS
    if count and count[-1][1] > max(least, share * count[-1][0]):
        yield Finding(
            'float16 overflows',
            f'{count[-1][1]:g} of {count[-1][0]:,} steps were skipped',
            "set config.precision='bfloat16', or lower the learning rate",
        )


def _pixels(run: _Run) -> Iterator[Finding]:
    seen = []
    for name, title in (('knn_top1', 'kNN'), ('linear_top1', 'a linear classifier')):
        ours, pixels = run.result(name), run.summary.get(f'{name}{PIXELS}')
        if None not in (ours, pixels) and run.learned and ours < pixels:
            seen.append(f'{title} reaches {ours:.1f}% on features and {pixels:.1f}% on raw pixels')
    if seen:
        yield Finding(
            'Nothing gained over pixels',
            ', and '.join(seen),
            'train for longer (config.optimizer.num_epochs), use a wider trunk '
            '(config.model.trunk) or weaker distortions (config.augment)',
        )


_SIGNS = (
    _too_many, _soft, _rate, _freeze, _queue, _overflows, _stuck, _equal, _prototypes, _unused,
    _pixels,
)  # fmt: skip
