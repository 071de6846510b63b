r"""Export a run's weights to PyTorch.

    python -m swav_jax.export --workdir RUN --out FILE \
        [--layout torchvision|vissl|swav] [--format pth|safetensors] [--step N]

Layouts: torchvision (the trunk alone, for torchvision's models with fc = Identity), vissl (a
checkpoint's trunk and heads, for VISSL's evaluations), swav (trunk, projection head and prototypes,
for facebookresearch/swav).
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swav_jax import cli, models, torch_weights
from swav_jax.errors import UserError
from swav_jax.runs.checkpoint import Checkpoints
from swav_jax.terminal import printable
from swav_jax.torch_weights.layouts import LAYOUTS


def export(
    workdir: str | Path,
    out: str | Path,
    *,
    layout: str = 'torchvision',
    file_format: str = 'pth',
    step: int | None = None,
) -> str:
    """Write the weights of a run's checkpoint to `out`, whole or not at all.

    Args:
      workdir: the folder of the run.
      layout, file_format: one of `torch_weights.LAYOUTS` and of `torch_weights.FORMATS`.
      step: which checkpoint; None is the newest.

    Returns:
      A line that says what was written.

    Raises:
      UserError: there is no such checkpoint, or `out` cannot be written.
    """
    folder = Path(workdir).expanduser() / 'checkpoints'
    if not folder.is_dir():
        raise UserError(
            f'--workdir={printable(workdir)} is not the folder of a run: it has no checkpoints/'
        )
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        step, variables, metadata = checkpoints.read(
            ('params', 'batch_stats'), step, accept=_naming
        )
    state = torch_weights.to_torch(variables, layout, **_naming(metadata))
    torch_weights.write(out, state, file_format)
    content = 'the trunk' if layout == 'torchvision' else 'trunk, head and prototypes'
    return f'{printable(out)}: {content} of step {step}, {len(state)} tensors, layout {layout}'


def _naming(metadata: dict[str, Any]) -> dict[str, Any]:
    """What the names of a run's tensors depend on."""
    model = metadata['config']['model']
    return {
        'trunk': models.trunk_class(model['trunk']),
        'activation': model['head']['activation_name'].lower() != 'none',
    }


def main(argv: Sequence[str]) -> int:
    """Run the command line that the module's docstring explains; return the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument('--workdir', type=cli.path, required=True, help='folder of the run')
    parser.add_argument('--out', type=cli.new_file, required=True, help='file to write')
    parser.add_argument('--layout', choices=LAYOUTS, default='torchvision')
    parser.add_argument('--format', choices=torch_weights.FORMATS, default='pth')
    parser.add_argument('--step', type=cli.integer(), help='which checkpoint (default: the newest)')
    found = parser.parse(argv)
    print(
        export(
            found.workdir,
            found.out,
            layout=found.layout,
            file_format=found.format,
            step=found.step,
        )
    )


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
