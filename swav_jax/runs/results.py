"""Names of a run's results, and of the same numbers without training."""

# Ends of the names of numbers that were measured without training, and what they are.
UNTRAINED, PIXELS = '_untrained', '_pixels'
WITHOUT_TRAINING = {UNTRAINED: 'untrained', PIXELS: 'raw pixels'}


def without_end(name: str) -> str:
    """The name of a result without `UNTRAINED` or `PIXELS` at its end."""
    return name.removesuffix(UNTRAINED).removesuffix(PIXELS)
