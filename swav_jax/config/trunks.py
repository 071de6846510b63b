"""The settings of each trunk: `config.model.trunk` holds a trunk's name and its settings alone.

The networks are in swav_jax/models. A new trunk is a dataclass of its settings here, with a line in
`TRUNKS`, and a module there, with a line in `models.TRUNKS`.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict

from swav_jax.config.kinds import (
    SWITCH,
    Kind,
    Scalar,
    Section,
    one_of,
    positive,
    real,
    value_of,
    whole,
)
from swav_jax.errors import UserError, printable, refusal

SECTION = 'config.model.trunk'
WIDEST = 65_536  # channels or features

# Numbers of blocks in the four stages of a ResNet, by its depth.
BLOCKS = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
STEM = one_of('imagenet', 'small')
ABOVE_1 = real(math.nextafter(1, 2), 1000, 'a number above 1, at most 1000')


class TrunkSettings(Protocol):
    """A frozen dataclass of a trunk's settings, whose fields are made by `setting`."""

    def check(self) -> None:
        """Refuse values that make no network together; each is sound by itself.

        Raises:
          UserError: it names one of the settings.
        """


def setting(default: Any, kind: Kind, about: str) -> Any:
    """A field of a trunk's settings.

    Args:
      default: its value where nobody gives one; one that `kind` does not allow must be given.
      kind: what it may be by itself.
      about: what it means, for docs/settings.md.
    """
    return dataclasses.field(default=default, metadata={'kind': kind, 'about': about})


def given(kind: Scalar) -> Scalar:
    """A kind of settings that have to be given, because no value suits most trunks."""
    return dataclasses.replace(kind, words=f'{kind.words}; it has no default')


@dataclass(frozen=True)
class ResNet:
    """ResNet and ResNeXt."""

    depth: int = setting(50, one_of(*BLOCKS), 'layers')
    # VISSL's meaning; torchvision's wide_resnet50_2 is width_per_group=128 instead.
    width_multiplier: float = setting(1.0, positive(1e-6, 16), 'of every stage and the output')
    groups: int = setting(1, whole(1, WIDEST), 'of the 3×3 convolutions in bottlenecks (ResNeXt)')
    width_per_group: int = setting(64, whole(1, WIDEST), 'of these convolutions, in stage 1')
    layer4_stride: int = setting(2, one_of(1, 2), 'of the last stage; 1: a larger feature map')
    zero_init_residual: bool = setting(False, SWITCH, 'start each block as the identity')
    stem: str = setting('imagenet', STEM, '7×7, stride 2, max-pool; small: 3×3, stride 1, no pool')

    @property
    def has_bottlenecks(self) -> bool:
        """Whether the blocks have three convolutions, whose output is four times as wide."""
        return self.depth >= 50

    @property
    def stem_width(self) -> int:
        """Channels of the stem and nominal width of the first stage; each stage doubles it."""
        return max(1, round(64 * self.width_multiplier))

    def grouped_width(self, planes: int) -> int:
        """Channels of the 3×3 convolution in a bottleneck of nominal width `planes`."""
        return max(1, int(planes * self.width_per_group / 64)) * self.groups

    def check(self) -> None:
        """Refuse what makes no network, see `TrunkSettings`."""
        if not self.has_bottlenecks and (self.groups, self.width_per_group) != (1, 64):
            raise UserError(
                f'{SECTION}.depth {self.depth} has no grouped convolutions (groups is '
                f'{self.groups}, width_per_group {self.width_per_group}): use depth 50 or more, '
                'or groups 1 and width_per_group 64'
            )
        widest = self.grouped_width(8 * self.stem_width)
        if widest > WIDEST:
            raise UserError(
                f'{SECTION}.width_per_group={self.width_per_group} in {SECTION}.groups='
                f'{self.groups} with width_multiplier {self.width_multiplier} makes convolutions '
                f'of {widest:,} channels: lower them, {WIDEST:,} is the most'
            )


class Stage(NamedTuple):
    """A run of equally wide blocks; the first halves the resolution."""

    depth: int
    width: int
    group_width: int


@dataclass(frozen=True)
class RegNet:
    """RegNetX and RegNetY (Radosavovic et al., 2020, 2003.13678): see `stages`."""

    depth: int = setting(0, given(whole(1, 256)), 'blocks')
    w_0: int = setting(0, given(whole(8, WIDEST)), 'width of the first block, a multiple of 8')
    w_a: float = setting(0.0, real(0, WIDEST), "slope of the blocks' widths")
    w_m: float = setting(0.0, given(ABOVE_1), "ratio of the stages' widths")
    group_width: int = setting(0, given(whole(1, WIDEST)), 'channels of a group (3×3 convolutions)')
    se_ratio: float = setting(0.25, real(0, 16), 'squeeze-and-excitation; 0: none (RegNetX)')
    stem: str = setting('imagenet', STEM, '3×3, stride 2; small: stride 1')

    STEM_WIDTH = 32

    def check(self) -> None:
        """Refuse what makes no network, see `TrunkSettings`."""
        if self.w_0 % 8:
            raise refusal(f'{SECTION}.w_0', self.w_0, 'a multiple of 8')
        widths = self._widths()
        if max(widths) > WIDEST:
            raise UserError(
                f'{SECTION}.w_a={self.w_a} with depth {self.depth}, w_0 {self.w_0} and w_m '
                f'{self.w_m} makes blocks {max(widths):,} wide: lower them, {WIDEST:,} is the most'
            )
        narrowest = min(self.STEM_WIDTH, *widths)
        if self.se_ratio and round(self.se_ratio * narrowest) < 1:
            raise UserError(
                f'{SECTION}.se_ratio={self.se_ratio} leaves none of {narrowest} channels: use more '
                f'than {0.5 / narrowest:g}, or 0 for no squeeze-and-excitation'
            )

    def stages(self) -> list[Stage]:
        """The stages that the settings generate, as in section 3.3 of the paper.

        Equal widths form a stage. Its width is moved to a multiple of its group width, by less than
        10% downwards, like torchvision does.
        """
        result = []
        for width, blocks in itertools.groupby(self._widths()):
            group = min(self.group_width, width)
            result.append(Stage(len(list(blocks)), _multiple(width, group), group))
        return result

    def _widths(self) -> list[int]:
        """The width of each block.

        Block j would be w_0 + w_a·j wide (eq. 2). This is rounded to w_0·w_m^s with whole s
        (eqs. 3, 4) and to a multiple of 8.
        """
        widths = []
        for j in range(self.depth):
            s = round(math.log((self.w_0 + self.w_a * j) / self.w_0) / math.log(self.w_m))
            widths.append(8 * round(self.w_0 * self.w_m**s / 8))
        return widths


def _multiple(width: int, divisor: int) -> int:
    """The multiple of `divisor` nearest to `width`, or the next one above 90% of it."""
    nearest = max(1, (2 * width + divisor) // (2 * divisor)) * divisor
    return nearest if nearest >= 0.9 * width else nearest + divisor


# What makes a trunk's settings, by the trunk's name. Its parameters are what the section may hold:
# RegNets that go by torchvision's name have a stem only.
TRUNKS: dict[str, Callable[..., TrunkSettings]] = {
    'resnet': ResNet,
    'regnet': RegNet,
    'regnet_y_400mf': partial(RegNet, 16, 48, 27.89, 2.09, 8, 0.25),
    'regnet_y_800mf': partial(RegNet, 14, 56, 38.84, 2.4, 16, 0.25),
    'regnet_y_1_6gf': partial(RegNet, 27, 48, 20.71, 2.65, 24, 0.25),
    'regnet_y_3_2gf': partial(RegNet, 21, 80, 42.63, 2.66, 24, 0.25),
    'regnet_y_8gf': partial(RegNet, 17, 192, 76.82, 2.19, 56, 0.25),
    'regnet_y_16gf': partial(RegNet, 18, 200, 106.23, 2.48, 112, 0.25),
    'regnet_y_32gf': partial(RegNet, 20, 232, 115.89, 2.53, 232, 0.25),
    'regnet_y_128gf': partial(RegNet, 27, 456, 160.83, 2.52, 264, 0.25),
    'regnet_x_400mf': partial(RegNet, 22, 24, 24.48, 2.54, 16, 0.0),
    'regnet_x_800mf': partial(RegNet, 16, 56, 35.73, 2.28, 16, 0.0),
    'regnet_x_1_6gf': partial(RegNet, 18, 80, 34.01, 2.25, 24, 0.0),
    'regnet_x_3_2gf': partial(RegNet, 25, 88, 26.31, 2.25, 48, 0.0),
    'regnet_x_8gf': partial(RegNet, 23, 80, 49.56, 2.88, 120, 0.0),
    'regnet_x_16gf': partial(RegNet, 22, 216, 55.59, 2.1, 128, 0.0),
    'regnet_x_32gf': partial(RegNet, 23, 320, 69.86, 2.0, 168, 0.0),
}


def section(name: str, **changes: Any) -> ConfigDict:
    """What `config.model.trunk` holds for a trunk: its name and settings, with their defaults.

    Args:
      name: a key of `TRUNKS`.
      changes: settings with other values than their defaults.

    Raises:
      UserError: there is no such trunk.
      KeyError, TypeError: it does not have a setting, or in another type.
    """
    if not (isinstance(name, str) and name in TRUNKS):
        raise refusal(f'{SECTION}.name', name, f'one of {", ".join(TRUNKS)}')
    made = ConfigDict({'name': name} | {key: field.default for key, field in fields(name).items()})
    made.lock().update(changes)
    return made


def adopt(found: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """The section of the trunk that `found['name']` names, from settings made for another trunk.

    Such are a section in which only the name was assigned, and one of an earlier version, which had
    the settings of all trunks. A setting that the trunk does not have is left out if it has the
    default of a trunk that has it.

    Raises:
      UserError: there is no such trunk, or a setting that it does not have was changed.
    """
    name = found.get('name')
    made = section(name)
    for key, value in found.items():
        if key not in made and not any(value == other.get(key) for other in map(section, TRUNKS)):
            raise _not_a_setting(name, key)
    return ConfigDict({key: found.get(key, default) for key, default in made.items()}).lock()


def parse(found: Any) -> TrunkSettings:
    """The settings in a section, checked.

    Raises:
      UserError: naming the first setting that cannot work, its value and what is allowed.
    """
    if not isinstance(found, ConfigDict):
        raise refusal(SECTION, found, "a section (ConfigDict), like trunks.section('resnet')")
    if 'name' not in found:
        raise UserError(f'{SECTION}.name is missing: give one of {", ".join(TRUNKS)}')
    name = value_of(found, 'name', SECTION)
    like = section(name)
    for key in found:
        if key not in like:
            raise _not_a_setting(name, key)
    kinds = {key: field.metadata['kind'] for key, field in fields(name).items()}
    Section({'name': one_of(name)} | kinds).check(SECTION, found)
    settings = TRUNKS[name](**{key: found[key] for key in kinds})
    settings.check()
    return settings


def title(found: Mapping[str, Any] | ConfigDict) -> str:
    """The trunk of a section in a word, like resnet50 or regnet_y_400mf."""
    return f'{found["name"]}{found["depth"]}' if found['name'] == 'resnet' else str(found['name'])


def fields(name: str) -> dict[str, dataclasses.Field]:
    """The settings of the trunk `name`, as fields of its dataclass."""
    make = TRUNKS[name]
    kind = make.func if isinstance(make, partial) else make
    taken = inspect.signature(make).parameters
    return {field.name: field for field in dataclasses.fields(kind) if field.name in taken}


class Trunk:
    """The kind of the section, see `kinds.Kind`."""

    words = f'a section with a name ({", ".join(TRUNKS)}) and the settings of that trunk'

    def check(self, name: str, value: Any) -> None:
        """See `Kind.check`; `name` is `SECTION`, the one place of such a section."""
        del name
        parse(value)


def _not_a_setting(name: str, key: Any) -> UserError:
    return UserError(
        f'{SECTION}.{printable(key)} is not a setting of the trunk {name!r}, which has '
        f'{", ".join(section(name))}: leave it out, or begin with {SECTION} = '
        f'trunks.section({name!r}), of swav_jax.config'
    )
