"""The recipes of docs/contributing.md: each block of Python is executed."""
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from oneshui.core import PresetError
from oneshui.methods import METHODS, method_rows
from oneshui.metrics import METRICS
from oneshui.readers import DATASETS, read_faces
from oneshui.tables import score_table
from oneshui.runs import RunStore, run_grid

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs/contributing.md').read_text()
NAMES = dict(method='head_only', dataset='staff', metric='left')


def block(heading, language='python'):
    "The one block of a language under a heading of the page."
    part = PAGE.split(f'\n## {heading}\n')[1].split('\n## ')[0]
    found = re.findall(rf'```{language}\n(.*?)```', part, re.S)
    assert len(found) == 1, heading
    return found[0]


RECIPES = dict(method=block('A method'), dataset=block('A data set'),
               metric=block('A metric'), experiment=block('An experiment'))


@pytest.fixture(scope='module')
def package(tmp_path_factory):
    "A package of somebody else's: the recipes as modules, and its entry points."
    home = tmp_path_factory.mktemp('outside')
    (home / 'forget_gently').mkdir()
    for kind in NAMES: (home / f'forget_gently/{kind}s.py').write_text(RECIPES[kind])
    toml = block('From a package of your own', 'toml')
    points = toml.replace('project.entry-points.', '').replace('"', '')
    info = home / 'forget_gently-1.dist-info'
    info.mkdir()
    said = 'Metadata-Version: 2.1\nName: forget-gently\nVersion: 1\n'
    (info / 'METADATA').write_text(said)
    (info / 'entry_points.txt').write_text(points)
    return home


@pytest.fixture(scope='module')
def declared(package):
    "The recipes imported here, and forgotten afterwards."
    registries = dict(method=METHODS, dataset=DATASETS, metric=METRICS)
    before = {kind: dict(r.load()) for kind, r in registries.items()}
    sys.path.insert(0, str(package))
    for kind in NAMES: importlib.import_module(f'forget_gently.{kind}s')
    yield registries
    sys.path.remove(str(package))
    for kind, r in registries.items(): r.clear(); r.update(before[kind])


def write_staff(home, faces):
    "The images of a data set in a layout of one's own, with faces.json, and as a CSV."
    (home / 'staff').mkdir()
    for p in faces.paths: shutil.copy(faces.root / p, home / 'staff' / Path(p).name)
    names = [Path(p).name for p in faces.paths]
    asked = ['Smiling', 'Mouth_Slightly_Open']   # frequent: of two, no hat may be worn
    table = pd.DataFrame(faces.targets.astype(int), columns=faces.classes)[asked]
    table = table.set_axis(['glasses', 'hat'], axis=1)
    table = table.assign(file=names, person=faces.identities[faces.identity])
    table.to_json(home / 'staff/faces.json')
    csv = table.rename(columns=dict(file='path', person='identity'))
    csv.assign(path='staff/' + csv.path).to_csv(home / 'staff.csv', index=False)
    return home


@pytest.fixture(scope='module')
def staff(tmp_path_factory, data_dir):
    return write_staff(tmp_path_factory.mktemp('staff'), read_faces('celeba', data_dir))


@pytest.fixture(scope='module')
def store(tmp_path_factory, data_dir):
    return RunStore(tmp_path_factory.mktemp('runs'), data_dir)


@pytest.mark.parametrize('kind', RECIPES)
def test_recipes_are_short(kind):
    lines = [line for line in RECIPES[kind].splitlines() if line.strip()]
    assert len(lines) <= 20 and max(map(len, lines)) <= 88


def test_method_has_a_row_and_a_run(declared, store, smoke):
    assert method_rows().index('head_only') < method_rows().index('scrub')
    s = store.spec(smoke, 'mufac', 2, 0, 'head_only')
    weights = lambda s: store.get(s).model().state_dict()
    before, after = weights(store.related(s, 'pretrain')), weights(s)
    moved = {k for k in before if (before[k] != after[k]).any()}
    assert moved == {'head.weight', 'head.bias'}
    assert 0 <= store.metric(s, 'tow')['tow'] <= 100


def test_method_appears_in_the_table(declared, store, smoke):
    rows = ['pretrain', 'retrain', 'head_only']
    results = run_grid(store, smoke, ['mufac'], [0], rows, n_jobs=1)
    table = score_table(results, 'mufac', 2)
    assert list(table.iloc[:, 0]) == ['Pretrain', 'Retrain', 'Head only']


def test_method_is_checked_like_a_built_in_one(declared, store, smoke):
    with pytest.raises(PresetError, match='lr = -1'):
        store.spec(smoke, 'mufac', 2, 0, 'head_only', dict(lr=-1))
    assert store.spec(smoke, 'mufac', 2, 0, 'head_only', dict(lr=.1)).hyper == {}


@pytest.mark.parametrize('name', ['staff', 'staff.csv'])
def test_data_set_runs(declared, staff, smoke, tmp_path, name):
    store = RunStore(tmp_path, staff)
    assert store.faces(name).classes == ['glasses', 'hat']
    n = smoke.cell(name).n_forget[0]
    results = run_grid(store, smoke, [name], [0], ['retrain', 'neggrad'], n_jobs=1)
    tow = results[(results.metric == 'tow') & (results.method == 'neggrad')].value
    assert n in set(results.n_forget) and tow.between(0, 100).all()


def test_data_set_and_csv_are_the_same_table(declared, staff):
    a, b = read_faces('staff', staff), read_faces('staff.csv', staff)
    assert (a.targets == b.targets).all() and (a.identity == b.identity).all()


def test_metric_is_among_the_metrics_of_a_run(declared, store, smoke):
    s = store.spec(smoke, 'mufac', 2, 0, 'head_only')
    pretrain, retrain = (store.related(s, w) for w in ('pretrain', 'retrain'))
    assert store.metrics(retrain)['left'] == 0
    scores = {r.method: store.metrics(r)['forget'] for r in (s, pretrain, retrain)}
    above = {m: scores[m] - scores['retrain'] for m in scores}
    want = 100 * above['head_only'] / above['pretrain'] if above['pretrain'] else 0
    assert store.metric(s, 'left')['left'] == pytest.approx(want)


def test_experiment_runs(declared, store, data_dir, tmp_path):
    given = dict(preset='smoke', data_dir=str(data_dir), store=str(store.root),
                 out_dir=str(tmp_path), focus=['mufac'], n_jobs=1)
    exec(compile(RECIPES['experiment'], 'docs/contributing.md', 'exec'), given)
    assert list(given['table'].label) == ['η = 0.1', 'η = 0.05', 'η = 0.2']
    assert set(given['table'].verdict) == {'', 'one training'}
    assert {f.suffix for f in tmp_path.glob('head_only.*')} == {
        '.csv', '.md', '.tex', '.png', '.svg'}


ASK = '''
from oneshui.methods import METHODS, method_rows
from oneshui.metrics import METRICS
from oneshui.readers import DATASETS
for registry, name in ((METHODS, 'head_only'), (DATASETS, 'staff'), (METRICS, 'left')):
    print(registry[name].home)
assert 'head_only' in method_rows()
'''


def test_entry_points_of_an_installed_package(package):
    env = os.environ | dict(PYTHONPATH=f'{package}{os.pathsep}{ROOT}')
    r = subprocess.run([sys.executable, '-c', ASK], env=env, cwd=package,
                       capture_output=True, text=True)
    assert r.stdout.split() == [f'forget_gently.{kind}s' for kind in NAMES], r.stderr


def test_two_packages_that_declare_one_name_are_told(declared, package):
    again = package / 'forget_harshly.py'
    again.write_text(RECIPES['method'])
    with pytest.raises(PresetError, match='and again in forget_harshly'):
        importlib.import_module('forget_harshly')
