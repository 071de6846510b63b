"""Refuse settings that cannot work, before anything is built.

`settings` has what each may be by itself, this file what they must be together.
"""

import functools
from typing import Any

from swav_jax.config.kinds import Section
from swav_jax.config.settings import MOST_CROPS, SETTINGS
from swav_jax.errors import UserError, refusal

MOST_BATCH_BYTES = 64e9  # of canvases, or of crops, on one device


def validate(config: Any) -> None:
    """Check every setting that can be checked without images, devices and networks.

    Args:
      config: what should be a ConfigDict with the names and types of `default()`.

    Raises:
      UserError: it names the first setting that cannot work, its value and what is allowed.
    """
    _WHOLE.check('config', config)
    _check_method(config)
    _check_crops(config.data)
    _check_memory(config.data, config.train.micro_batches)
    _check_channels(config.data)
    _check_model(config.model)
    radius, most = config.augment.blur_radius_min, config.augment.blur_radius_max
    if radius > most:
        allowed = f'at most config.augment.blur_radius_max={most}'
        raise refusal('config.augment.blur_radius_min', radius, allowed)
    size, resize = config.evaluate.size, config.evaluate.resize
    if size > resize:
        allowed = f'at most config.evaluate.resize={resize}: a crop lies inside its image'
        raise refusal('config.evaluate.size', size, allowed)


def _sections() -> Section:
    """The kinds of all settings as a tree of sections."""
    tree: dict[str, Any] = {}
    for path, setting in SETTINGS.items():
        *above, name = path.split('.')
        section = tree
        for part in above:
            section = section.setdefault(part, Section({})).parts
        section[name] = setting.kind
    return Section(tree)


_WHOLE = _sections()


def _check_method(config: Any) -> None:
    for name, setting in SETTINGS.items():
        if setting.methods and config.method not in setting.methods:
            value = functools.reduce(getattr, name.split('.'), config)
            if value != setting.default:
                raise UserError(
                    f'config.{name}={value} is a setting of config.method='
                    f'{" or ".join(setting.methods)}: leave it out with {config.method}'
                )


def _check_crops(data: Any) -> None:
    groups, total = len(data.num_crops), sum(data.num_crops)
    if total > MOST_CROPS:
        allowed = f'at most {MOST_CROPS} crops together'
        raise refusal('config.data.num_crops', data.num_crops, allowed)
    for name in ('size_crops', 'crop_scales'):
        if len(data[name]) != groups:
            allowed = f'{groups} long, like config.data.num_crops={data.num_crops}'
            raise refusal(f'config.data.{name}', data[name], allowed)
    for i, (least, most) in enumerate(data.crop_scales):
        if least > most:
            raise refusal(f'config.data.crop_scales[{i}]', (least, most), 'in ascending order')


def _check_memory(data: Any, micro_batches: int) -> None:
    crops = sum(n * size**2 for n, size in zip(data.num_crops, data.size_crops, strict=True))
    canvases = micro_batches * data.canvas_size**2
    for name, values in (('canvas_size', canvases), ('size_crops', 4 * crops)):
        needed = data.batchsize_per_replica * data.channels * values
        if needed > MOST_BATCH_BYTES:
            of_all = name == 'canvas_size' and micro_batches > 1
            turns = f', config.train.micro_batches={micro_batches}' * of_all
            raise UserError(
                f'config.data.batchsize_per_replica={data.batchsize_per_replica}{turns} with '
                f'config.data.{name}={data[name]} and config.data.channels={data.channels} takes '
                f'{needed / 1e9:,.0f} GB of one device for the pixels alone: lower them to less '
                f'than {MOST_BATCH_BYTES / 1e9:.0f} GB'
            )


def _check_channels(data: Any) -> None:
    for name in ('mean', 'std'):
        if len(data[name]) != data.channels:
            allowed = f'{data.channels} numbers, one per channel'
            raise refusal(f'config.data.{name}', data[name], f'{allowed} (config.data.channels)')


def _check_model(model: Any) -> None:
    if 0 in model.head.dims[1:]:
        allowed = "positive widths; only the first, the trunk's, may be 0 to have it inferred"
        raise refusal('config.model.head.dims', model.head.dims, allowed)
    frozen = model.temp_frozen_params_iter_map
    names = [name for name, _ in frozen]
    if '' in names or len(set(names)) < len(names):
        allowed = 'pairs of a name and a number of steps, each name once'
        raise refusal('config.model.temp_frozen_params_iter_map', frozen, allowed)
