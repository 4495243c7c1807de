"""Runs a notebook in a process that is forked from one that has imported the libraries.

To import them anew takes ten seconds, more than most notebooks take at preset smoke.
"""
import multiprocessing
import os
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest.mock import patch

import ipywidgets  # noqa: F401, what follows is imported once for all notebooks
import matplotlib.pyplot  # noqa: F401
import sklearn.ensemble  # noqa: F401
import torch
import torchmetrics  # noqa: F401
from execnb.shell import CaptureShell
from joblib.externals.loky import get_reusable_executor
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from threadpoolctl import threadpool_limits

import oneshui.desk  # noqa: F401
import oneshui.findings  # noqa: F401
import oneshui.tables  # noqa: F401

_starting = threading.Lock()   # two threads would put back each other's environment


def run_cells(notebook, parameters):
    "Cell after cell, in a shell of its own. Raises what a cell raises."
    torch.set_num_threads(1)             # two notebooks at a time, on two cores
    threadpool_limits(1)
    os.environ['OMP_NUM_THREADS'] = '1'  # for processes that it starts
    os.chdir(notebook.parent)
    sys.path.insert(0, '')
    nb = load_notebook_node(str(notebook))
    if parameters: nb = parameterize_notebook(nb, parameters)
    shell = CaptureShell(mpl_format='png')
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        shell.run(cell.source)
        if shell.exc: raise RuntimeError(f'in the cell\n{cell.source}') from shell.exc


def report_cells(notebook, parameters, failure):
    "`run_cells`; what it raises is in a file, which is empty if it raises nothing."
    try:
        run_cells(notebook, parameters)
        failure.write_text('')
    except BaseException:
        failure.write_text(traceback.format_exc())
        raise SystemExit(1) from None
    finally:   # a process waits for its workers, and they five minutes for more work
        get_reusable_executor().shutdown(kill_workers=True)


def run_notebook(notebook, failure, **parameters):
    "What went wrong in a notebook, as text; '' if nothing did."
    forked = multiprocessing.get_context('forkserver')
    forked.set_forkserver_preload([__name__])
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])   # where it looks
    with _starting, patch.dict(os.environ, PYTHONPATH=here): ensure_running()
    Path(failure).unlink(missing_ok=True)
    job = forked.Process(target=report_cells,
                         args=(Path(notebook), parameters, Path(failure)))
    job.start()
    job.join()
    # to start a process polls all others, and of two who read an exit code at once one
    # finds nothing and says 255: what counts is the file
    said = Path(failure).read_text() if Path(failure).exists() else 'nothing was said'
    return said and f'exit code {job.exitcode}: {said}'


def two_at_a_time(run, names):
    "name -> what the run of its notebook returned."
    with ThreadPoolExecutor(2) as two: return dict(zip(names, two.map(run, names)))
