"""Every other notebook from top to bottom at preset smoke; impossible parameters."""
import json
import time
from pathlib import Path

import pytest
from notebook_process import run_notebook, two_at_a_time
from test_tables import EVALUATION

ROOT = Path(__file__).resolve().parents[1]
PLAIN = [str(p.relative_to(ROOT)) for p in sorted((ROOT / 'nbs').rglob('*.ipynb'))
         if p.stem not in ('05_tables', 'cluster', *EVALUATION)   # test_cluster: 3 min
         and '.ipynb_checkpoints' not in p.parts]


def smallest(notebook):
    "The parameters of a quick run, of those that a notebook has."
    cells = json.loads((ROOT / notebook).read_text())['cells']
    has = ''.join(line for c in cells if 'parameters' in c['metadata'].get('tags', [])
                  for line in c['source'])
    return {k: v for k, v in dict(preset='smoke', n_jobs=1).items() if f'{k} =' in has}


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    d = tmp_path_factory.mktemp('plain')
    run = lambda n: run_notebook(ROOT / n, d / Path(n).stem, **smallest(n))
    return two_at_a_time(run, PLAIN)


@pytest.mark.parametrize('notebook', PLAIN)
def test_notebook_runs(plain, notebook):
    assert not plain[notebook], plain[notebook][-3000:]


BAD = [
    (dict(presett='smoke'), 'unknown parameter presett. Valid: preset, data_dir'),
    (dict(preset='huge'), 'Valid: smoke, mini, photographs, paper'),
    (dict(datasets='["lfw"]'), 'Valid: celebahq, celeba, mufac'),
    (dict(seeds='["a"]'), 'parameter seeds'),
    (dict(data_dir='/nowhere'), '/nowhere: no such folder'),
    (dict(preset='paper'), 'needs data_dir'),
    (dict(preset='photographs'), 'the folder with mufac.'),
]


@pytest.mark.parametrize('given, say', BAD, ids=[say for _, say in BAD])
def test_bad_parameters_fail_at_once(tmp_path, given, say):
    start = time.time()
    assert say in run_notebook(ROOT / 'nbs/05_tables.ipynb', tmp_path / 'said', **given)
    assert time.time() - start < 60
