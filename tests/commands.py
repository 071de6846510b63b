"""Command lines run as `python -m` and `python` run them, in this process."""

import runpy
import sys
import warnings

from processes import ROOT

EVALUATE = ('knn', 'linear', 'semi', 'clusters', 'features', 'report')


def call(program, *argv):
    """The exit code of a module (swav_jax.main) or a script (scripts/parity.py)."""
    before = sys.argv, sys.path[:]
    sys.argv = [program, *argv]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.* found in sys.modules', RuntimeWarning)
            if program.endswith('.py'):
                sys.path.insert(0, str(ROOT / 'scripts'))
                runpy.run_path(str(ROOT / program), run_name='__main__')
            else:
                runpy.run_module(program, run_name='__main__', alter_sys=True)
    except SystemExit as done:
        return done.code or 0
    finally:
        sys.argv, sys.path[:] = before
    return 0
