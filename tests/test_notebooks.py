"""Every notebook runs from top to bottom at the smallest preset; 05_tables headless, from both folders, twice; 06-13 on its store."""
import json, os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
EVALUATION = [
    '06_figures',
    '07_attacks',
    '08_ablations',
    '09_robustness',
    '10_similarity',
    '11_released_code',
    '12_metastep',
    '13_metastep_results',
]
NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT / 'nbs').rglob('*.ipynb') if p.stem not in ('05_tables', *EVALUATION))


def papermill(notebook, out, *args, cwd=ROOT):
    env = os.environ | dict(ONESHUI_PROGRESS='off')
    return subprocess.run(
        [BIN / 'papermill', '--no-progress-bar', '--log-level', 'ERROR', '-k', 'python3', notebook, out, *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=str)
def test_notebook_runs(notebook, tmp_path):
    has_preset = any('parameters' in c['metadata'].get('tags', []) for c in json.loads((ROOT / notebook).read_text())['cells'])
    r = papermill(notebook, tmp_path / 'out.ipynb', *(['-p', 'preset', 'smoke'] if has_preset else []))
    assert r.returncode == 0, r.stderr[-3000:]


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    d = tmp_path_factory.mktemp('tables')
    r = papermill(
        'nbs/05_tables.ipynb',
        d / 'out.ipynb',
        '-p',
        'preset',
        'smoke',
        '-p',
        'store',
        d / 'runs',
        '-p',
        'out_dir',
        d / 'figures',
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return d


def test_tables_headless(tables):
    results = pd.read_csv(tables / 'figures/results.csv')
    assert (
        list(results.columns) == ['dataset', 'n_forget', 'seed', 'method', 'metric', 'value']
        and not results.value.isna().any()
    )
    assert {'retain', 'forget', 'test', 'mia', 'tow', 'seconds'} <= set(results.metric)
    assert set(results.method) == {
        'pretrain',
        'retrain',
        'neggrad',
        'ssd',
        'pgu',
        'jit',
        'metaunlearn',
        'metastep',
        'scrub',
        'bad_teacher',
    }
    assert (results.query('method == "retrain" and metric == "tow"').value == 100).all()
    for name in ('table1_celebahq', 'table2_celeba', 'table3_mufac'):
        for ext in ('csv', 'md', 'tex', 'png', 'svg'):
            assert (tables / f'figures/{name}.{ext}').stat().st_size > 100


def test_tables_again_from_the_other_folder_are_the_same_and_make_nothing(tables):
    before = {p: p.stat().st_mtime_ns for p in (tables / 'runs').rglob('metrics*.json')}
    r = papermill('05_tables.ipynb', tables / 'again.ipynb', '-p', 'preset', 'smoke', '-p', 'store', tables / 'runs', '-p', 'out_dir', tables / 'again', cwd=ROOT / 'nbs')
    assert r.returncode == 0, r.stderr[-3000:]
    assert {p: p.stat().st_mtime_ns for p in (tables / 'runs').rglob('metrics*.json')} == before, 'a finished run was made again'
    for name in ('results.csv', 'table1_celebahq.md', 'table3_mufac.tex'):
        assert (tables / 'again' / name).read_bytes() == (tables / 'figures' / name).read_bytes()


@pytest.fixture(scope='module')
def evaluation(tables):
    run = lambda n: papermill(f'nbs/{n}.ipynb', tables / f'{n}.ipynb', '-p', 'preset', 'smoke', '-p', 'store', tables / 'runs', '-p', 'out_dir', tables / 'figures', '-p', 'n_jobs', '1')
    with ThreadPoolExecutor(2) as two:
        return dict(zip(EVALUATION, two.map(run, EVALUATION)))   # two processes in one store, as it happens


@pytest.mark.parametrize('notebook, files', list(zip(EVALUATION, [
    ['split_celeba.png', 'split_celebahq.svg', 'split_mufac.png', 'scatter.svg', 'tow.png', 'roc.svg', 'similarity.png', 'meta_training.svg'], ['attack_rmia.md', 'attack_change.tex', 'attacks.csv', 'attacks.png'],
    [f'ablation_{g}.{e}' for g in ('objective', 'inputs', 'distance', 'steps', 'requests') for e in ('csv', 'md', 'tex', 'png', 'svg')], ['robustness.md', 'single.csv', 'sequence.tex', 'sequence.png'],
    ['similarity.csv', 'similarity_images.md', 'similarity_portrait.svg'], ['released_code.csv', 'released_code.md'], [],
    ['metastep_why.md', 'metastep_comparison.csv', 'metastep_comparison.svg', 'ablation_metastep.png', 'metastep_attacks.tex']])))
def test_evaluation_headless(evaluation, tables, notebook, files):
    assert evaluation[notebook].returncode == 0, evaluation[notebook].stderr[-3000:]
    for f in files: assert (tables / 'figures' / f).stat().st_size > 100, f


def test_evaluation_tables_hold_numbers(evaluation, tables):
    read = lambda n: pd.read_csv(tables / f'figures/{n}.csv')
    a = read('attacks')
    assert (
        set(a.attack) == {'loss', 'loss_released', 'rmia', 'rmia_best'}
        and a.auc.between(0, 100).all()
        and len(a) == 4 * 3 * 10
    ), 'one seed: no U-LiRA'
    r = read('released_code')
    assert {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12} == set(r.item) and r[['paper', 'code', 'difference']].notna().all().all()
    steps = read('ablation_steps')
    assert len(steps) == 5 and (steps.n == 1).all() and steps.tow_half.isna().all(), 'one seed has no interval'


@pytest.mark.parametrize('args, says', [
    (['-p', 'presett', 'smoke'], 'Valid: preset, data_dir, datasets, seeds'),
    (['-p', 'preset', 'huge'], 'Valid: smoke, mini, paper'),
    (['-p', 'datasets', '["lfw"]'], 'Valid: celebahq, celeba, mufac'),
    (['-p', 'seeds', '["a"]'], 'seeds'),
    (['-p', 'data_dir', '/nowhere'], '/nowhere: no such folder'),
    (['-p', 'preset', 'paper'], 'needs data_dir'),
])
def test_bad_parameters_fail_at_once(args, says, tmp_path):
    t = time.time(); r = papermill('nbs/05_tables.ipynb', tmp_path / 'out.ipynb', *args)
    assert r.returncode != 0 and says in r.stderr, r.stderr[-1500:]
    assert time.time() - t < 60
