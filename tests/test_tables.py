"""Chapter 5 under papermill, and the notebooks that stand on its store, at smoke.

06-13, 17 and 18 are forked from a process that has imported the libraries.
"""
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from notebook_process import run_notebook, two_at_a_time
from test_outside import write_staff

from oneshui.methods import method_rows
from oneshui.readers import read_faces

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PICTURE, TABLE = ('png', 'svg'), ('csv', 'md', 'tex')


def named(name, *extensions): return [f'{name}.{e}' for e in extensions]


GROUPS = ('objective', 'inputs', 'distance', 'steps', 'requests')
EVALUATION = {   # notebook -> files that it leaves
    '06_figures': ['split_celeba.png', 'split_celebahq.svg', 'split_mufac.png',
                   *(f'{name}.svg' for name in ('scatter', 'tow', 'trade', 'roc',
                                                  'similarity')),
                   *named('meta_training', *PICTURE)],
    '07_attacks': [*named('attacks', *TABLE, *PICTURE), *named('attacks_roc', *PICTURE),
                   'attacks_compared.csv', *named('oracles', *TABLE),
                   *(f for name in ('relearning', 'three_sample', 'people')
                     for f in named(name, *TABLE, *PICTURE))],
    '08_ablations': ['last_digit.csv',
                     *(f for group in GROUPS
                       for f in named(f'ablation_{group}', *TABLE, *PICTURE))],
    '09_robustness': [f for name in ('robustness', 'single', 'sequence')
                      for f in named(name, *TABLE, *PICTURE)],
    '10_similarity': [*named('similarity_images', *TABLE, *PICTURE),
                      *named('similarity_portrait', *TABLE, *PICTURE),
                      *named('similarity_faces', *PICTURE)],
    '11_released_code': named('released_code', *TABLE, *PICTURE),
    '12_metastep': [],
    '13_metastep_results': [*named('metastep_attacks', *TABLE),
                            *named('metastep_plane', *PICTURE),
                            *named('metastep_why', *TABLE, *PICTURE),
                            *named('metastep_comparison', *TABLE, *PICTURE),
                            *named('ablation_metastep', *TABLE, *PICTURE)],
    '17_regimes': ['regimes.csv', *named('regimes', *PICTURE)],
    '18_kept': named('kept', *TABLE, *PICTURE),
}


def papermill(notebook, out, **parameters):
    "Execute a notebook in a process of its own, with one thread for each process."
    given = [str(x) for k, v in parameters.items() for x in ('-p', k, v)]
    env = os.environ | dict(ONESHUI_PROGRESS='off', OMP_NUM_THREADS='1')
    return subprocess.run(
        [BIN / 'papermill', '--no-progress-bar', '--log-level', 'ERROR',
         '-k', 'python3', notebook, out, *given],
        cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    d = tmp_path_factory.mktemp('tables')
    r = papermill('nbs/05_tables.ipynb', d / 'tables.ipynb', preset='smoke',
                  store=d / 'runs', out_dir=d / 'figures')
    assert r.returncode == 0, r.stderr[-3000:]
    return d


def forked(d, figures, **more):
    "Chapter 5 at smoke on the store in a folder; what went wrong."
    given = dict(preset='smoke', n_jobs=1, store=f'{d}/runs', out_dir=f'{d}/{figures}')
    return run_notebook(ROOT / 'nbs/05_tables.ipynb', d / 'said', **given, **more)


def test_tables_headless(tables):
    results = pd.read_csv(tables / 'figures/results.csv')
    columns = ['dataset', 'n_forget', 'seed', 'request', 'method', 'metric', 'value']
    assert list(results.columns) == columns and not results.value.isna().any()
    assert {'retain', 'forget', 'test', 'mia', 'tow', 'seconds'} <= set(results.metric)
    rows = {*method_rows(), 'retrain_again', 'MetaStep, own labels'}
    assert set(results.method) == rows
    tow = results[results.metric == 'tow'].set_index('method').value
    # a request of the smoke preset may be too small for Pretrain to differ
    assert (tow['retrain'] == 100).all() and (tow['pretrain'] < 100).any()
    for name, n in (('table1_celebahq', 4), ('table2_celeba', 3), ('table3_mufac', 2)):
        for f in (*named(name, 'csv', *PICTURE), *named(f'{name}_{n}', 'md', 'tex')):
            assert (tables / 'figures' / f).stat().st_size > 100, f


def test_tables_again_from_the_other_folder_make_nothing(tables):
    made = lambda: {p: p.stat().st_mtime_ns for p in (tables / 'runs').rglob('*')
                    if p.suffix in ('.json', '.safetensors')}
    before = made()
    assert not forked(tables, 'again')   # from nbs/; papermill ran at the top
    assert made() == before, 'a finished run was made again'
    for name in ('results.csv', 'table1_celebahq_4.md', 'table3_mufac_3.tex'):
        again, first = (tables / d / name for d in ('again', 'figures'))
        assert again.read_bytes() == first.read_bytes()


def test_tables_of_a_csv_of_a_user(tmp_path, data_dir):
    write_staff(tmp_path, read_faces('celeba', data_dir))
    said = forked(tmp_path, 'figures', datasets='["staff.csv"]', data_dir=str(tmp_path))
    assert not said, said[-3000:]
    results = pd.read_csv(tmp_path / 'figures/results.csv')
    assert set(results.dataset) == {'staff.csv'}
    for n in results.n_forget.unique():
        assert 'Retrain' in (tmp_path / f'figures/table_staff_{n}.md').read_text()


@pytest.fixture(scope='module')
def evaluation(tables):
    "Two processes in one store, as it happens."
    given = dict(preset='smoke', store=str(tables / 'runs'),
                 out_dir=str(tables / 'figures'), n_jobs=1)
    run = lambda n: run_notebook(ROOT / f'nbs/{n}.ipynb', tables / n, **given)
    return two_at_a_time(run, EVALUATION)


@pytest.mark.parametrize('notebook', EVALUATION)
def test_evaluation(evaluation, tables, notebook):
    assert not evaluation[notebook], evaluation[notebook][-3000:]
    for f in EVALUATION[notebook]:
        assert (tables / 'figures' / f).stat().st_size > 100, f


def test_evaluation_tables_hold_numbers(evaluation, tables):
    read = lambda n: pd.read_csv(tables / f'figures/{n}.csv')
    a = read('attacks')
    attacks = {'loss', 'loss_released', 'rmia', 'rmia_best', 'rmia_independent'}
    assert set(a.attack) == attacks, 'one training: no LiRA'
    assert a.auc.between(0, 100).all() and len(a) == 5 * 3 * 9
    r = read('released_code')
    assert {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 16} == set(r.item)
    assert r[['paper', 'code', 'difference']].notna().all().all()
    steps = read('ablation_steps')
    assert len(steps) == 5 and (steps.n == 1).all()
    assert steps.tow_half.isna().all(), 'one seed has no interval'


def test_papermill_says_what_is_wrong(tmp_path):
    r = papermill('nbs/05_tables.ipynb', tmp_path / 'out.ipynb', datasets='["lfw"]')
    assert r.returncode and 'Valid: celebahq, celeba, mufac' in r.stderr
