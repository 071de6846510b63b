"""LARC and schedules against apex and ClassyVision, frozen parameters, decay masks."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from swav_jax import config, optim

FOLDER = Path(__file__).parent / 'golden'
LARC = np.load(FOLDER / 'larc.npz')
LARC_META = json.loads(str(LARC['meta']))
SCHEDULES = np.load(FOLDER / 'schedules.npz')
SCHEDULES_META = json.loads(str(SCHEDULES['meta']))


def settings(**changes):
    optimizer = config.default().optimizer
    with optimizer.unlocked():
        optimizer.update(changes)
    return optimizer


@pytest.mark.parametrize('case', LARC_META)
def test_larc_and_sgd_equal_apex(case):
    meta = LARC_META[case]

    def stored(name):
        prefix = f'{case}/{name}/'
        return {k.removeprefix(prefix): LARC[k] for k in LARC.files if k.startswith(prefix)}

    with jax.enable_x64(True):
        rates = jnp.array(meta['lrs'])
        larc = {key: meta[key] for key in ('clip', 'eps', 'trust_coefficient')}
        params = {name: jnp.array(value) for name, value in stored('params0').items()}
        tx = optim.make_optimizer(
            settings(
                larc_config=larc,
                weight_decay=meta['weight_decay'],
                momentum=meta['momentum'],
                nesterov=meta['nesterov'],
            ),
            lambda count: rates[count],
            dict([meta['frozen']]) if meta['frozen'] else {},
            params,
        )
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(meta['steps']):
            updates, state = update(stored(f'grads{step}'), state, params)
            params = optax.apply_updates(params, updates)
            for name, expected in stored(f'params{step + 1}').items():
                np.testing.assert_allclose(params[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('case', SCHEDULES_META)
def test_schedules_equal_classy_vision(case):
    with jax.enable_x64(True):
        rates = jax.vmap(optim.schedule(SCHEDULES_META[case]))(jnp.array(SCHEDULES['where']))
        np.testing.assert_allclose(rates, SCHEDULES[case], rtol=1e-9)


@pytest.mark.parametrize('name', ['sgd', 'lars', 'adam', 'adamw'])
def test_a_frozen_parameter_does_not_move_and_gathers_no_momentum(name):
    params = {'head': {'prototypes0': {'kernel': jnp.ones(4)}, 'linear0': {'kernel': jnp.ones(4)}}}
    grads = jax.tree.map(lambda x: 0.5 * x, params)
    optimizer = settings(name=name, use_larc=False, weight_decay=0.1)
    tx = optim.make_optimizer(optimizer, 0.1, {'prototypes0': 3}, params)
    plain = optim.make_optimizer(optimizer, 0.1, {}, params)

    def path(tx, steps):
        moved, state, result = params, tx.init(params), []
        for _ in range(steps):
            updates, state = tx.update(grads, state, moved)
            moved = optax.apply_updates(moved, updates)
            result.append(moved['head'])
        return result

    frozen, free = path(tx, 5), path(plain, 5)
    for step in range(3):
        np.testing.assert_array_equal(frozen[step]['prototypes0']['kernel'], 1)
    # What was frozen starts as if the run began now; what was not never noticed.
    for step in (0, 1):
        np.testing.assert_allclose(
            frozen[3 + step]['prototypes0']['kernel'],
            free[step]['prototypes0']['kernel'],
            rtol=1e-6,
        )
    rounding = 0 if name in ('sgd', 'lars') else 3e-7  # lax.cond makes Adam another program
    np.testing.assert_allclose(
        frozen[4]['linear0']['kernel'], free[4]['linear0']['kernel'], rtol=rounding
    )


def test_a_frozen_pattern_fits_whole_names_only_or_is_an_error():
    params = {'head': {f'prototypes{i}': {'kernel': jnp.ones(2)} for i in (1, 10)}}
    tx = optim.make_optimizer(settings(use_larc=False), 1.0, {'head/prototypes1': 5}, params)
    updates, _ = tx.update(params, tx.init(params), params)
    assert not updates['head']['prototypes1']['kernel'].any()
    assert updates['head']['prototypes10']['kernel'].all()
    with pytest.raises(ValueError, match="'prototype'"):
        optim.make_optimizer(settings(), 1.0, {'prototype': 5}, params).init(params)


@pytest.mark.parametrize(
    ('regularize_bn', 'regularize_bias', 'undecayed'),
    [
        (True, True, set()),
        (False, True, {'bn/scale', 'bn/bias'}),
        (True, False, {'linear/bias'}),
        (False, False, {'bn/scale', 'bn/bias', 'linear/bias'}),
    ],
)
def test_decay_follows_regularize_bn_and_regularize_bias(regularize_bn, regularize_bias, undecayed):
    params = {'bn': {'scale': 1.0, 'bias': 1.0}, 'linear': {'kernel': 1.0, 'bias': 1.0}}
    mask = optim.decay_mask(params, regularize_bn=regularize_bn, regularize_bias=regularize_bias)
    found = {optim.path_name(p) for p, decayed in jax.tree.leaves_with_path(mask) if not decayed}
    assert found == undecayed


def test_optax_lars_is_the_other_choice():
    params = {'kernel': jnp.arange(1.0, 5.0)}
    grads = {'kernel': jnp.ones(4)}
    optimizer = settings(name='lars', weight_decay=0.01)
    ours = optim.make_optimizer(optimizer, 0.3, {}, params)
    theirs = optax.lars(0.3, 0.01, trust_coefficient=0.001, eps=1e-8, momentum=0.9)
    updates, _ = ours.update(grads, ours.init(params), params)
    expected, _ = theirs.update(grads, theirs.init(params), params)
    np.testing.assert_array_equal(updates['kernel'], expected['kernel'])


@pytest.mark.parametrize('name', ['adam', 'adamw'])
def test_adam_equals_pytorchs_from_the_step_at_which_a_parameter_thaws(name):
    """PyTorch's frozen parameter has no gradient, which its optimizer leaves out."""
    rng = np.random.default_rng(0)
    start = {'linear0': {'kernel': rng.normal(size=(3, 2))}, 'prototypes0': {'kernel': np.ones(4)}}
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape), start) for _ in range(6)]
    rates = 1e-2 * np.arange(1, 7)
    optimizer = settings(name=name, use_larc=False, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6)
    with jax.enable_x64(True):
        tx = optim.make_optimizer(
            optimizer, lambda count: jnp.array(rates)[count], {'prototypes0': 3}, start
        )
        params, state, update = start, tx.init(start), jax.jit(tx.update)
        for gradient in grads:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)

    tensors = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), start)
    their = {'adam': torch.optim.Adam, 'adamw': torch.optim.AdamW}[name](
        jax.tree.leaves(tensors), betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1
    )
    for step, gradient in enumerate(grads):
        for tensor, g in zip(jax.tree.leaves(tensors), jax.tree.leaves(gradient), strict=True):
            tensor.grad = None if step < 3 and tensor.shape == (4,) else torch.tensor(g)
        their.param_groups[0]['lr'] = rates[step]
        their.step()
    for ours, tensor in zip(jax.tree.leaves(params), jax.tree.leaves(tensors), strict=True):
        np.testing.assert_allclose(ours, tensor.detach(), rtol=1e-12)


@pytest.mark.parametrize('name', ['lars', 'adam', 'adamw'])
def test_settings_that_only_sgd_reads_are_named(name):
    (line,) = optim.unread(settings(name=name))
    assert 'config.optimizer.use_larc=True' in line and f"name='{name}'" in line
    assert not optim.unread(settings(name=name, use_larc=False))
    assert not optim.unread(settings(name='sgd'))


# Learning rates over a run.


def rates(lr, batch_size, steps=(0, 25, 50, 999)):
    of_step = optim.learning_rate(lr, batch_size=batch_size, total_steps=1000, steps_per_epoch=10)
    return [float(of_step(step)) for step in steps]


def test_learning_rate_follows_the_batch_and_the_warm_up_keeps_its_start():
    lr = config.warmup_cosine(warmup=0.05)
    cosine = np.cos(np.pi * np.array([0.05, 0.999]))
    top, end = 4.8 / 1000 + 0.5 * (4.8 - 0.0048) * (1 + cosine)
    np.testing.assert_allclose(rates(lr, 4096), [0.3, 2.55, top, end], rtol=1e-4)
    np.testing.assert_allclose(rates(lr, 2048), [0.3, 1.35, top / 2, end / 2], rtol=1e-4)


def test_a_small_batch_still_warms_up():
    start, middle, top, _ = rates(config.warmup_cosine(warmup=0.05), 64)
    assert start < middle < top <= 0.075


def test_square_root_scaling():
    lr = config.warmup_cosine(warmup=0.05)
    lr.auto_lr_scaling.scaling_type = 'sqrt'
    assert optim.scale_learning_rate(lr, 1024)['schedulers'][1]['start_value'] == pytest.approx(0.6)


def test_every_schedule_is_scaled_to_its_peak_and_keeps_its_shape():
    scaling = {
        'auto_lr_scaling': dict(
            auto_scale=True, base_value=0.1, base_lr_batch_size=256, scaling_type='linear'
        )
    }
    multistep = optim.scale_learning_rate(SCHEDULES_META['multistep'] | scaling, 512)
    np.testing.assert_allclose(multistep['values'], [0.2, 0.02, 0.002, 0.0002])
    assert optim.scale_learning_rate(SCHEDULES_META['constant'] | scaling, 512)['value'] == 0.2
    restarts = optim.scale_learning_rate(SCHEDULES_META['restart_half_warmup'] | scaling, 512)
    pieces = restarts['schedulers']
    assert pieces[0]['start_value'] == pytest.approx(0.2 * 0.6 / 4.8)
    assert pieces[2]['end_value'] == pytest.approx(0.2 * 2.114 / 4.8)


def test_update_interval_epoch_holds_the_rate_within_an_epoch():
    lr = dict(SCHEDULES_META['cosine_rescaled'], update_interval='epoch')
    first, same, next_epoch = rates(lr, 256, steps=(20, 29, 30))
    assert first == same < next_epoch


@pytest.mark.parametrize(
    ('change', 'message'),
    [({'lengths': (0.5, 0.4)}, 'sum to 0.9'), ({'name': 'cosin'}, "unknown schedule 'cosin'")],
)
def test_a_schedule_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        optim.schedule(SCHEDULES_META['swav_400ep'] | change)
