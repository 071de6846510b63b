"""The max-pooling of the ImageNet stem, without scatters, and the averages of the last map."""

import jax
from jax import lax
from jax import numpy as jnp


def average_pool(x: jax.Array, grid: int = 1) -> jax.Array:
    """Averages over grid × grid parts of a map, like torch.nn.AdaptiveAvgPool2d(grid), flattened.

    Args:
      x: (B, H, W, C).
      grid: parts along each side; they overlap where it does not divide H or W.

    Returns:
      (B, C · grid²) in PyTorch's order, float32 or wider.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if grid == 1:
        return jnp.mean(x, (1, 2), dtype=wide)
    rows, columns = (
        [slice(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
        for side in x.shape[1:3]
    )
    parts = [jnp.mean(x[:, row, column], (1, 2), dtype=wide) for row in rows for column in columns]
    return jnp.stack(parts, -1).reshape(len(x), -1)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Maxima of 3×3 windows, two pixels apart, of images padded by one pixel of -inf.

    Like torch.nn.functional.max_pool2d(x, 3, 2, 1), the gradient goes to the first maximum of a
    window in reading order, and NaN wins. The backward pass of XLA's own takes a hundred times as
    long on the CPU, because it scatters one element after the other.

    Args:
      x: (B, H, W, C) images.

    Returns:
      (B, ⌈H / 2⌉, ⌈W / 2⌉, C).
    """
    return _forward(x)[0]


def _forward(x):
    height, width = x.shape[1:3]
    out_height, out_width = (height + 1) // 2, (width + 1) // 2
    pads = [(0, 0), (1, 2 * out_height - height), (1, 2 * out_width - width), (0, 0)]
    padded = jnp.pad(x, pads, constant_values=-jnp.inf)
    y = padded[:, 0:-1:2, 0:-1:2]
    winner = jnp.zeros_like(y, jnp.uint8)
    for i in range(1, 9):
        row, column = divmod(i, 3)
        value = padded[
            :, row : row + 2 * out_height - 1 : 2, column : column + 2 * out_width - 1 : 2
        ]
        wins = (value > y) | jnp.isnan(value)
        y = jnp.where(wins, value, y)
        winner = jnp.where(wins, i, winner)
    # An empty slice carries the size of x, which the shape of y does not tell.
    return y, (winner, x[:0])


def _backward(residuals, dy):
    """Each pixel gathers from the one, two or four windows that it lies in."""
    winner, like_x = residuals
    height, width = like_x.shape[1:3]
    out_height, out_width = dy.shape[1:3]

    def won(row, column):
        return jnp.where(winner == 3 * row + column, dy, 0)

    def next_row(a):
        return lax.pad(
            a, jnp.zeros_like(a, shape=()), [(0, 0, 0), (-1, 1, 0), (0, 0, 0), (0, 0, 0)]
        )

    def next_column(a):
        return lax.pad(
            a, jnp.zeros_like(a, shape=()), [(0, 0, 0), (0, 0, 0), (-1, 1, 0), (0, 0, 0)]
        )

    # Pixels of even rows lie in the middle row of one window; those of odd rows in the last row of
    # one and the first row of the next. The same holds for columns.
    even, odd = zip(
        *((won(i, 1), won(i, 2) + next_column(won(i, 0))) for i in range(3)), strict=True
    )
    rows = [[a[1], a[2] + next_row(a[0])] for a in (even, odd)]
    (even_even, odd_even), (even_odd, odd_odd) = rows
    even_row = jnp.stack([even_even, even_odd], axis=3)
    odd_row = jnp.stack([odd_even, odd_odd], axis=3)
    dx = jnp.stack([even_row, odd_row], axis=2)
    dx = dx.reshape(-1, 2 * out_height, 2 * out_width, dy.shape[-1])
    return (dx[:, :height, :width],)


max_pool.defvjp(_forward, _backward)
