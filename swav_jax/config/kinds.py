"""Kinds of values: what a setting may be, how an error and the docs describe it, and the check."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ml_collections import ConfigDict

from swav_jax.errors import UserError, printable, refusal


class Kind(Protocol):
    """What a value may be.

    Attributes:
      words: completes 'must be …'.
    """

    words: str

    def check(self, name: str, value: Any) -> None:
        """Refuse a value.

        Args:
          name: the full name of the setting, for the error.
          value: anything.

        Raises:
          UserError: it names the setting, or the part of it, with its value and what is allowed.
        """


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A number, a word, text or a switch."""

    words: str
    holds: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """See `Kind.check`."""
        if not self.holds(value):
            raise refusal(name, value, self.words)


def whole(least: int, most: int) -> Scalar:
    """Whole numbers in a range, both ends included."""
    return Scalar(
        f'a whole number from {least:,} to {most:,}',
        lambda x: isinstance(x, int) and not isinstance(x, bool) and least <= x <= most,
    )


def real(least: float, most: float, words: str = '') -> Scalar:
    """Finite numbers in a range, both ends included."""
    return Scalar(
        words or f'a number from {_short(least)} to {_short(most)}',
        lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and least <= x <= most,
    )


def _short(x: float) -> str:
    return f'{x:,}' if isinstance(x, int) else f'{x:g}'


def positive(least: float, most: float) -> Scalar:
    """Numbers above 0 in a range, both ends included."""
    return real(least, most, f'a number above 0, from {_short(least)} to {_short(most)}')


def one_of(*choices: str | int) -> Scalar:
    """Some words, or some numbers."""
    return Scalar(
        f'one of {", ".join(map(str, choices))}',
        lambda x: type(x) in (str, int) and x in choices,
    )


SWITCH = Scalar('True or False', lambda x: isinstance(x, bool))
TEXT = Scalar('a string without zero bytes', lambda x: isinstance(x, str) and '\0' not in x)


@dataclasses.dataclass(frozen=True)
class Several:
    """A tuple or list of values of one kind.

    Attributes:
      each: what its parts may be.
      least, most: how many there may be.
    """

    each: Kind
    least: int
    most: int

    @property
    def words(self) -> str:
        """As in `Kind`."""
        count = f'{self.least}' if self.least == self.most else f'{self.least} to {self.most:,}'
        return f'a tuple of {count}, each {self.each.words}'

    def check(self, name: str, value: Any) -> None:
        """See `Kind.check`."""
        if not (isinstance(value, (tuple, list)) and self.least <= len(value) <= self.most):
            raise refusal(name, value, self.words)
        for i, part in enumerate(value):
            self.each.check(f'{name}[{i}]', part)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A tuple or list of two values, each of its own kind."""

    first: Kind
    second: Kind

    @property
    def words(self) -> str:
        """As in `Kind`."""
        return f'a pair of {self.first.words} and {self.second.words}'

    def check(self, name: str, value: Any) -> None:
        """See `Kind.check`."""
        if not (isinstance(value, (tuple, list)) and len(value) == 2):
            raise refusal(name, value, self.words)
        self.first.check(f'{name}[0]', value[0])
        self.second.check(f'{name}[1]', value[1])


@dataclasses.dataclass(frozen=True)
class Section:
    """Settings by name.

    Attributes:
      parts: what each setting may be.
      optional: names of those that may be missing.
      types: what holds them.
    """

    parts: Mapping[str, Kind]
    optional: tuple[str, ...] = ()
    types: tuple[type, ...] = (ConfigDict,)

    @property
    def words(self) -> str:
        """As in `Kind`."""
        return f'a section (ConfigDict) with {", ".join(self.parts)}'

    def check(self, name: str, value: Any) -> None:
        """See `Kind.check`."""
        if not isinstance(value, self.types):
            raise refusal(name, value, self.words)
        for part in value:
            if part not in self.parts:
                near = difflib.get_close_matches(str(part), list(self.parts), n=1, cutoff=0)[0]
                raise UserError(f'{name}.{printable(part)} is not a setting: {near} is')
        for part, kind in self.parts.items():
            if part in value:
                kind.check(f'{name}.{part}', value_of(value, part, name))
            elif part not in self.optional:
                raise UserError(
                    f'{name}.{part} is missing: start from swav_jax.config.default(), which has it'
                )


def value_of(section: Mapping | ConfigDict, part: str, name: str) -> Any:
    """A value of the section `name`, which ConfigDict may have to compute.

    Raises:
      UserError: computing it fails, for example because it refers to a value that was never set.
    """
    try:
        return section[part]
    except Exception as error:
        reason = printable(' '.join(str(error).split()))
        raise UserError(f'{name}.{part} has no value: {type(error).__name__}: {reason}') from error
