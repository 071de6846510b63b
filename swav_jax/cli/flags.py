"""The flags of every command, and all checks of them that need neither JAX nor TensorFlow.

A function per command adds the flags to a parser and parses a command line, so that a mistake is
reported at once, before the module that runs the command is imported.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from swav_jax import cli
from swav_jax import config as settings
from swav_jax.config import saved
from swav_jax.errors import UserError, printable

Flags = argparse.Namespace


def train(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """Pretraining; `config` holds the settings."""
    switch = {'nargs': '?', 'const': True, 'default': False}
    _add_config(parser)
    text = 'folder of the run; a run in it is resumed from its last checkpoint'
    _add(parser, '--workdir', cli.new_folder, 'RUN', text)
    text = 'resume a run although its model, optimizer or data have changed'
    _add(parser, '--force', cli.boolean, 'true|false', text, **switch)
    text = 'write a trace of N steps into RUN/profile, for TensorBoard or Perfetto'
    _add(parser, '--profile', cli.integer(), 'N', text, default=0)

    several = parser.add_argument_group('several processes that are one run')
    text = 'join the others, which SLURM, Open MPI or Kubernetes lists, or else the flags below'
    _add(several, '--distributed', cli.boolean, 'true|false', text, **switch)
    _add(several, '--coordinator', str, 'HOST:PORT', 'where process 0 listens')
    _add(several, '--num_processes', cli.integer(1), 'N', 'number of processes')
    _add(several, '--process_id', cli.integer(), 'I', 'number of this process, from 0')

    plans = parser.add_argument_group('plan of a run')
    text = (
        'print what the run will take, and exit: batch, steps, learning rate, memory, FLOPs, bytes '
        'sent, host cores, with warnings'
    )
    _add(plans, '--plan', cli.boolean, 'true|false', text, **switch)
    text = 'number of devices (default: 0, those of this machine)'
    _add(plans, '--replicas', cli.integer(), 'N', text, default=0)
    text = "propose micro-batches with which the batch fits a device's memory, as 80GB"
    _add(plans, '--memory', cli.size, 'SIZE', text)
    text = 'images per second that the host has to decode'
    _add(plans, '--images_per_second', cli.number(1, 1e9), 'N', text, default=1000)

    found = _with_config(parser.parse(argv))
    if found.config is None:
        raise UserError('--config is missing: name a config file, for example configs/swav_r50.py')
    return found


def plan(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """The plan of a run: those of `train`."""
    return train(parser, ['--plan', *argv])


def preview(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """A picture of crops; `config` holds the settings."""
    _add_config(parser, required=True)
    text = 'picture to write, in the format of its name'
    _add(parser, '--output', _picture, 'FILE', text, default=Path('preview.png'))
    _add(parser, '--images', cli.integer(1, 1000), 'N', 'rows of the picture', default=6)
    found = _with_config(parser.parse(argv))
    settings.validate(found.config)
    return found


def knn(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """Accuracy of the neighbours' votes."""
    _add_network(parser)
    _add_labelled(parser)
    text = 'numbers of neighbours (default: config.evaluate.k)'
    _add(parser, '--k', cli.integer(1), 'K', text, nargs='+')
    _add_choice(parser, '--features', ('trunk', 'embeddings'), 'features to compare')
    return _with_network(parser.parse(argv))


def linear(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """A linear probe; `crop_scale` is None for the images' centres."""
    _add_network(parser)
    _add_classifier(parser, ", or none for the images' centres")
    _add_choice(parser, '--preset', ('swav', 'vissl', 'logistic'), 'recipe, see above')
    text = 'with --preset logistic: inverse strength of the penalty'
    _add(parser, '--c', cli.positive(), 'C', text, default=1.0)
    return _with_classifier(parser.parse(argv), centres=True)


def semi(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """Fine-tuning on a share of the labels."""
    _add_network(parser)
    _add_classifier(parser)
    text = 'share of the labelled images to learn from, above 0 to 1'
    _add(parser, '--share', cli.positive(1), 'SHARE', text, default=0.1)
    text = 'recipe, see above (default: 1 for a --share below 0.05, else 10)'
    parser.add_argument('--preset', choices=('1', '10'), help=text)
    text = "learning rate of the trunk for 256 images per step (default: the preset's)"
    _add(parser, '--trunk_learning_rate', cli.positive(), 'RATE', text)
    return _with_classifier(parser.parse(argv))


def clusters(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """Prototypes as clusters."""
    _add_network(parser)
    _add_source(parser, 'config.data.source')
    _add(parser, '--out', str, 'FOLDER', 'folder to write', required=True)
    text = 'number of the head of prototypes, from 0'
    _add(parser, '--head', cli.integer(), 'N', text, default=0)
    return _with_network(parser.parse(argv))


def features(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """Features as arrays."""
    _add_network(parser)
    _add_source(parser, 'config.data.source')
    text = 'file that ends in .npz, or folder, to write'
    _add(parser, '--out', str, 'FILE.npz|FOLDER', text, required=True)
    return _with_network(parser.parse(argv))


def report(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """A page on a run."""
    _add_network(parser, weights=False)
    _add_source(parser, 'config.evaluate.test_source, or 2,000 of config.data.source')
    return _with_network(parser.parse(argv))


def compare(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """Several runs; `out` is None if it is not given."""
    parser.add_argument('runs', nargs='+', type=cli.path, metavar='RUN', help='folder of a run')
    text = 'page to write, *.html (default: compare.html; none with --json)'
    _add(parser, '--out', _html, 'FILE', text)
    text = 'print one JSON object for scripts, see above'
    parser.add_argument('--json', action='store_true', help=text)
    found = parser.parse(argv)
    seen = {}
    for folder in found.runs:
        shown = printable(folder)
        if not (folder / 'metrics.jsonl').is_file():
            raise UserError(f'{shown} holds no metrics.jsonl: name the folder of a run')
        other = seen.setdefault(folder.resolve(), shown)
        if other is not shown:
            raise UserError(f'{other} and {shown} are the same folder: name each run once')
    if len(found.runs) < 2:
        raise UserError('a second RUN is missing: name the folders of at least two runs')
    return found


def export(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """Weights of a run as a file."""
    _add(parser, '--workdir', cli.path, 'RUN', 'folder of the run', required=True)
    _add(parser, '--out', cli.new_file, 'FILE', 'file to write', required=True)
    layouts = ('torchvision', 'vissl', 'swav')
    _add_choice(parser, '--layout', layouts, 'names of the tensors, see above')
    _add_choice(parser, '--format', ('pth', 'safetensors'), 'format of the file')
    text = 'whose weights; momentum: of config.method=swav_momentum'
    _add_choice(parser, '--encoder', ('network', 'momentum'), text)
    _add_step(parser)
    found = parser.parse(argv)
    saved.check_folder(found.workdir)
    return found


def replay(parser: cli.Parser, argv: Sequence[str]) -> Flags:
    """A step that was not finite."""
    parser.add_argument('folder', type=cli.path, help='nan_dump of a run')
    found = parser.parse(argv)
    if not (found.folder / 'about.json').is_file():
        raise UserError(f'{printable(found.folder)} holds no dump: name the nan_dump of a run')
    return found


def _add(
    parser: argparse._ActionsContainer,
    name: str,
    kind: Callable[[str], Any],
    metavar: str,
    text: str,
    default: Any = None,
    **options: Any,
) -> None:
    """Add a flag, whose help gives its default if it has one."""
    if default is not None and default is not False and 'default' not in text:
        text += f' (default: {default})'
    parser.add_argument(name, type=kind, metavar=metavar, help=text, default=default, **options)


def _add_choice(parser: cli.Parser, name: str, choices: Sequence[str], text: str) -> None:
    """Add a flag whose default is the first choice."""
    text += f' (default: {choices[0]})'
    parser.add_argument(name, choices=choices, default=choices[0], help=text)


def _add_config(parser: cli.Parser, note: str = '', required: bool = False) -> None:
    parser.accept_changes()
    text = (
        f'config file{note}, for example configs/swav_r50.py; its first lines tell which words may '
        'follow a colon'
    )
    _add(parser, '--config', str, 'FILE[:WORDS]', text, required=required)


def _add_step(parser: cli.Parser) -> None:
    _add(parser, '--step', cli.integer(), 'N', 'step of the checkpoint (default: the newest one)')


def _add_network(parser: cli.Parser, weights: bool = True) -> None:
    """Add the flags that name a network and limit the images."""
    which = parser.add_mutually_exclusive_group(required=True)
    _add(which, '--workdir', cli.path, 'RUN', 'folder of a run')
    if weights:
        _add(which, '--weights', cli.path, 'FILE', 'PyTorch weights: .pth or .safetensors')
        _add_config(parser, ' of the network of --weights')
    else:
        parser.accept_changes()
        parser.set_defaults(weights=None, config=None)
    _add_step(parser)
    text = 'number of images to use of each source, evenly spread over it (default: 0, all)'
    _add(parser, '--limit', cli.integer(), 'N', text, default=0)


def _add_source(parser: cli.Parser, default: str) -> None:
    _add(parser, '--source', str, 'SOURCE', f'images (default: {default})')


def _add_labelled(parser: cli.Parser) -> None:
    for name, purpose in (('train', 'learn from'), ('test', 'test on')):
        text = f'labelled images to {purpose} (default: config.evaluate.{name}_source)'
        _add(parser, f'--{name}', str, 'SOURCE', text)


def _add_classifier(parser: cli.Parser, note: str = '') -> None:
    """Add the flags of the commands that train a classifier."""
    _add_labelled(parser)
    text = "passes over the images (default: the preset's)"
    _add(parser, '--epochs', cli.integer(1), 'N', text)
    text = "learning rate of the classifier for 256 images per step (default: the preset's)"
    _add(parser, '--learning_rate', cli.positive(), 'RATE', text)
    _add(parser, '--batch_size', cli.integer(1), 'N', 'images per step (default: 256)')
    text = f"least and largest share of an image's area in a crop{note} (default: 0.08 1)"
    _add(parser, '--crop_scale', str, 'SHARE', text, nargs='+', default=['0.08', '1'])
    text = 'seed of the weights, the order of the images and the crops'
    _add(parser, '--seed', cli.integer(0, 2**32 - 1), 'N', text, default=0)
    _add(parser, '--out', str, 'FOLDER', "folder to write (default: one in the run's folder)")


def _with_config(found: Flags) -> Flags:
    """Replace the name of a config file by the settings in it, with all changes."""
    found.config = cli.read_config(found.config, found.changes)
    return found


def _with_network(found: Flags) -> Flags:
    """Check what names a network; with --weights `config` becomes the settings of it."""
    for flag, needs in (('config', 'weights'), ('step', 'workdir')):
        value = getattr(found, flag)
        if value is not None and not getattr(found, needs):
            raise UserError(f'--{flag}={value} goes with --{needs}')
    if found.weights:
        file, changes = found.config, found.changes
        config = settings.default() if file is None else cli.load_config(file, changes)
        found.config = cli.override(config, changes)
        settings.validate(found.config)
        file = str(found.weights).rpartition(':')[0]  # of FILE:PART
        if not (found.weights.exists() or Path(file).is_file()):
            raise UserError(
                f'--weights={printable(found.weights)} does not exist: name PyTorch weights or the '
                'folder of a run'
            )
        return found
    saved.check_folder(found.workdir)
    config = saved.read(found.workdir)
    if config is not None:
        settings.validate(cli.override(config, found.changes))
    return found


def _with_classifier(found: Flags, centres: bool = False) -> Flags:
    """Replace the texts of --crop_scale by two numbers, or by None for `none` with `centres`."""
    given = found.crop_scale
    if centres and given == ['none']:
        found.crop_scale = None
    else:
        try:
            low, high = map(float, given)
        except ValueError:
            low = high = 0.0
        if not 0 < low <= high <= 1:
            raise UserError(
                f'--crop_scale {" ".join(given)}: give two numbers above 0 and at most 1'
                + ', or none' * centres
            )
        found.crop_scale = low, high
    return _with_network(found)


def _html(text: str) -> Path:
    """The type of a flag: a page to write, so that no record of a run is taken for it."""
    path = cli.new_file(text)
    if path.suffix != '.html':
        raise argparse.ArgumentTypeError(f'={text}: must end in .html')
    return path


def _picture(text: str) -> Path:
    """The type of a flag: a file for a figure, PNG if its name has no ending."""
    from matplotlib.backend_bases import FigureCanvasBase  # takes half a second to import

    path = cli.new_file(text)
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f'={text}: must end in one of .{", .".join(known)}')
    return path
