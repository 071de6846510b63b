r"""Export a run's weights to PyTorch.

    python -m swav_jax.export --workdir RUN --out FILE \
        [--layout torchvision|vissl|swav] [--format pth|safetensors] [--step N]

Layouts: torchvision (the trunk alone, for torchvision's models with fc = Identity), vissl (a
checkpoint's trunk and heads, for VISSL's evaluations), swav (trunk, projection head and prototypes,
for facebookresearch/swav).
"""

if __name__ == '__main__':  # before the imports, so that mistakes are reported without them
    from swav_jax import commands

    commands.run('export')

import argparse
import contextlib
from pathlib import Path
from typing import Any

from swav_jax import cli, models, torch_weights
from swav_jax.cli.flags import export as parse_export
from swav_jax.config import saved
from swav_jax.errors import printable
from swav_jax.runs import encoders
from swav_jax.runs.checkpoint import Checkpoints


def export(
    workdir: str | Path,
    out: str | Path,
    *,
    layout: str = 'torchvision',
    file_format: str = 'pth',
    step: int | None = None,
    encoder: str = 'network',
) -> str:
    """Write the weights of a run's checkpoint to `out`, whole or not at all.

    Args:
      workdir: the folder of the run.
      layout, file_format: one of `torch_weights.LAYOUTS` and of `torch_weights.FORMATS`.
      step: which checkpoint; None is the newest.
      encoder: 'network', or the 'momentum' encoder of a run that has one.

    Returns:
      A line that says what was written.

    Raises:
      UserError: there is no such checkpoint, or `out` cannot be written.
    """
    workdir = Path(workdir).expanduser()
    saved.check_folder(workdir)
    with contextlib.closing(Checkpoints(workdir / 'checkpoints')) as checkpoints:
        step, found, metadata = checkpoints.read(encoders.ENCODERS, step, accept=_naming)
    variables = encoders.variables(found, encoder)
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


def run(flags: argparse.Namespace) -> None:
    """Export as the flags tell, and print what was written."""
    print(
        export(
            flags.workdir,
            flags.out,
            layout=flags.layout,
            file_format=flags.format,
            step=flags.step,
            encoder=flags.encoder,
        )
    )


main = cli.command(__doc__, parse_export, run)
