"""Signs of a run that goes wrong: a good log has none, and each bad log exactly its own."""

import math
import re
from pathlib import Path

import pytest

from configs import demo
from swav_jax import config as settings
from swav_jax import methods
from swav_jax.evaluate import diagnosis

ROOT = Path(__file__).parent.parent
K, BATCH, LN_K = 100, 128, math.log(100)


def config_of(**changes):
    """Settings of a run of 6 epochs with 100 prototypes; names of `changes` have __ for a dot."""
    config = demo.get_config().unlock()
    config.data.batchsize_per_replica = BATCH
    config.model.head.dims, config.model.head.num_clusters = (0, 256, 64), (K,)
    config.model.temp_frozen_params_iter_map = (('head/prototypes0', 20),)
    config.loss.epsilon, config.optimizer.num_epochs = 0.05, 6
    for name, value in changes.items():
        *folders, leaf = name.split('__')
        section = config
        for folder in folders:
            section = section[folder]
        section[leaf] = value
    return settings.to_dict(config)


def along(*values):
    """A function of the share of the run that is done, through `values`."""

    def at(share):
        place = share * (len(values) - 1)
        i = min(int(place), len(values) - 2)
        return values[i] + (place - i) * (values[i + 1] - values[i])

    return at


# Values at equal distances of a run that learns, as real runs have them.
GOOD = {
    'loss_over_ln_k': along(1.03, 0.93, 0.87, 0.82),
    'active_prototypes': along(42, 35, 45, 50),
    'largest_prototype_share': along(0.36, 0.3, 0.15, 0.1),
    'code_entropy': along(0.75 * LN_K, 0.88 * LN_K, 0.75 * LN_K),
    'embedding_std': along(0.1, 0.065, 0.08),
}


def rows_of(**curves):
    curves = GOOD | curves
    return [
        {'step': step, 'epoch': step / 78}
        | {name: at(step / 468) for name, at in curves.items() if at is not None}
        for step in range(10, 469, 10)
    ]


def names(rows, config=None, events=(), summary=None, batch=BATCH):
    found = diagnosis.findings(rows, events, summary or {}, config or config_of(), batch)
    return [finding.name for finding in found]


def test_a_good_log_has_no_sign():
    assert names(rows_of()) == []
    result = {'step': 468, 'knn_top1': 85.0, 'prototypes_empty': 3, 'prototypes_near_duplicates': 2}
    assert names(rows_of(), events=[result], summary={'knn_top1_pixels': 81.1}) == []
    assert names([]) == names(rows_of()[:1]) == [], 'too early to tell'


STUCK = along(1.1, 1.0, 0.99, 0.99)
BAD = {
    'Stuck at ln K': dict(loss_over_ln_k=STUCK),
    'Equal embeddings': dict(embedding_std=along(0.1, 0.01, 0.01)),
    'Few prototypes': dict(active_prototypes=along(42, 12, 12)),
    'Learning rate too high': dict(loss_over_ln_k=along(1.03, 0.93, 0.93, 1.0)),
    'float16 overflows': dict(overflows=along(0, 50, 100)),
}


@pytest.mark.parametrize('name', BAD)
def test_a_bad_log_has_its_sign(name):
    assert names(rows_of(**BAD[name])) == [name]


BAD_SETTINGS = {
    'More prototypes than the batch can fill': (dict(model__head__num_clusters=(600,)), {}),
    'Soft codes': (dict(loss__epsilon=0.5), dict(code_entropy=along(LN_K, LN_K))),
    'Loss rises after the freeze': (
        dict(model__temp_frozen_params_iter_map=(('head/prototypes0', 156),)),
        dict(loss_over_ln_k=along(1.03, 0.9, 0.96, 0.96)),
    ),
    'Queue too early or too late': (
        dict(loss__queue__queue_length=1280, loss__queue__start_iter=150),
        dict(loss_over_ln_k=along(1.03, 0.93, 0.86, 0.94, 0.94, 0.94, 0.94)),
    ),
}


@pytest.mark.parametrize('name', BAD_SETTINGS)
def test_a_bad_setting_has_its_sign_beside_a_log_that_shows_it(name):
    changes, curves = BAD_SETTINGS[name]
    assert names(rows_of(**curves), config_of(**changes)) == [name]


def test_a_queue_that_the_run_does_not_reach():
    late = config_of(loss__queue__queue_length=1280, loss__queue__start_iter=460)
    assert names(rows_of(), late) == ['Queue too early or too late']
    good = config_of(loss__queue__queue_length=1280, loss__queue__start_iter=200)
    assert names(rows_of(), good) == []


def test_a_queue_that_is_used_before_the_loss_has_fallen():
    """The demo with 1,920 images from the first step on: few prototypes, though the loss moves."""
    early = config_of(loss__queue__queue_length=20 * BATCH)
    curves = dict(loss_over_ln_k=along(1.03, 0.9, 0.92), active_prototypes=along(42, 6, 6))
    assert 'Queue too early or too late' in names(rows_of(**curves), early)
    assert names(rows_of(loss_over_ln_k=along(1.03, 0.9, 0.88)), early) == []


def test_results_of_evaluations_are_signs():
    for name, heading in (
        ('prototypes_empty', 'Empty prototypes'),
        ('prototypes_near_duplicates', 'Near duplicates'),
    ):
        assert names(rows_of(), events=[{'step': 9, name: 0}, {'step': 468, name: 30}]) == [heading]
        assert names(rows_of(), events=[{'step': 9, name: 30}, {'step': 468, name: 0}]) == []
    pixels = {'knn_top1_pixels': 81.1, 'linear_top1_pixels': 82.2}
    result = {'step': 468, 'knn_top1': 72.4, 'linear_top1': 85.0}
    (sign,) = diagnosis.findings(rows_of(), [result], pixels, config_of(), BATCH)
    assert sign.name == 'Nothing gained over pixels'
    assert 'kNN reaches 72.4% on features and 81.1% on raw pixels' in sign.seen
    assert 'linear' not in sign.seen, 'which is better than pixels'


def test_advice_for_clusters_is_not_sinkhorns():
    """Nothing shares a batch equally, and epsilon is a setting that is refused."""
    config = config_of(method='deepcluster_v2', model__head__num_clusters=(5 * BATCH,))
    rows = rows_of(loss_over_ln_k=along(1, 1), active_prototypes=along(2, 2))
    found = diagnosis.findings(rows, (), {}, config, BATCH)
    advice = [finding.change for finding in found]
    assert advice and not any('epsilon' in text or 'queue' in text for text in advice)
    assert all(text[0] != ' ' and not text.startswith(('or ', ',')) for text in advice)
    assert 'More prototypes than the batch can fill' not in [finding.name for finding in found]


def test_causes_come_before_their_effects():
    """300 prototypes at batch 64, epsilon 0.5, learning rate × 30, as it was measured."""
    config = config_of(
        model__head__num_clusters=(300,), data__batchsize_per_replica=64, loss__epsilon=0.5
    )
    rows = rows_of(
        loss_over_ln_k=along(1.138, 1.0, 1.0),
        active_prototypes=along(45, 4, 6),
        largest_prototype_share=along(0.13, 0.9, 0.9),
        code_entropy=along(math.log(300), math.log(300)),
        embedding_std=along(0.099, 0.028, 0.028),
    )
    assert names(rows, config, batch=64) == [
        'More prototypes than the batch can fill',
        'Soft codes',
        'Learning rate too high',
        'Stuck at ln K',
        'Few prototypes',
    ]


def test_a_log_with_gaps_is_read():
    """Values that were not finite, a log without health metrics, an unknown batch."""
    rows = [row | {'loss_over_ln_k': None, 'embedding_std': None} for row in rows_of()]
    assert names(rows) == []
    gaps = [
        row | ({'loss_over_ln_k': None} if i % 2 else {})
        for i, row in enumerate(rows_of(loss_over_ln_k=STUCK))
    ]
    assert names(gaps) == ['Stuck at ln K']
    assert names([{'step': 468, 'loss': 3.0}], batch=None) == []
    many = config_of(model__head__num_clusters=(3000,))
    assert names(rows_of(active_prototypes=along(42, 150, 150)), many, batch=None) == []


def test_every_name_is_a_heading():
    """Of those that findings have, and of those that warnings of a collapse point to."""
    headings = re.findall(r'^## (.+)$', (ROOT / 'docs' / 'learning.md').read_text(), re.M)
    assert [name for name in headings if name in diagnosis.NAMES] == list(diagnosis.NAMES)
    method = methods.make(demo.get_config())
    for loss, spread in ((1.0, 0.1), (0.5, 0.0)):
        _, heading = method.sign_of_collapse({'loss_over_ln_k': loss, 'embedding_std': spread})
        assert heading in headings
