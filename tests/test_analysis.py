"""What notebooks 06-11 ask the runs: stored once, shared where it can be, honest about what failed."""
import json
import os

import numpy as np
import pandas as pd
import pytest
import torch

from oneshui import analysis
from oneshui.analysis import attack_runs, in_turn, metaunlearn_variants, portrait_similarity, progress_by_bin, single_hyper, variant_specs, variant_table, with_portrait
from oneshui.baselines import METHODS, method
from oneshui.data import FacesError
from oneshui.runs import RunStore, cell_metrics, make_runs, measure


@pytest.fixture(scope='module')
def store(tmp_path_factory, data_dir): return RunStore(tmp_path_factory.mktemp('analysis'), data_dir)


def test_variants_share_what_they_can(store, smoke):
    v = metaunlearn_variants(smoke.hyper('celeba', 'metaunlearn', 2))
    specs = variant_specs(store, smoke, 'celeba', 2, [0], v['steps'])
    make_runs(store, list(specs.values()), 1)
    assert (
        len(list(store.root.glob('celeba-*-metaunlearn-prepared-*'))) == 1
        and len(list(store.root.glob('celeba-2-seed0-metaunlearn-*'))) == 5
    ), 'five step counts, one meta-training'
    assert len({json.dumps(cell_metrics(store, s)['retain']) for s in specs.values()}) > 1
    for group in v.values():
        assert next(iter(group.values())) == {}, 'the default comes first'
        for change in group.values():
            METHODS['metaunlearn'].check(smoke.hyper('celeba', 'metaunlearn', 2) | dict(simulated_size=2) | change)


def test_every_objective_learns(store, smoke):
    base = smoke.hyper('mufac', 'metaunlearn', 2)
    specs = [
        store.spec(smoke, d, 2, 0, 'metaunlearn', base | c)
        for d in ('mufac', 'celeba')
        for c in metaunlearn_variants(base)['objective'].values()
    ]
    make_runs(store, specs, 1)
    states = [store.prepared(s)[0] for s in specs]; firsts = [s['h.net.0.weight'] for s in states]
    assert all(torch.isfinite(w).all() for w in firsts) and all(
        not torch.equal(a, b) for i, a in enumerate(firsts[:5]) for b in firsts[:i]
    ), 'another objective, another φ'
    assert [any(k.startswith('r.') for k in s) for s in states] == [False] * 5 + [True] + [False] * 5 + [True]


def test_a_diverging_preparation_stops_only_what_needs_it(store, smoke):
    def diverge(model, train, val): raise FloatingPointError('A is nan')
    @method('diverging', 'Diverging', prepare=diverge)
    def unlearn(model, support, state): raise AssertionError('must not be reached')
    try:
        bad, good = store.spec(smoke, 'mufac', 2, 0, 'diverging', {}), store.spec(smoke, 'mufac', 2, 0, 'neggrad')
        with pytest.raises(FacesError, match='(?s)^1 of .*diverging-prepared.*A is nan'):
            make_runs(store, [bad, good], 1)
        assert store.has(good) and not store.has(bad)
    finally: del METHODS['diverging']


def test_measured_once_and_again_only_if_the_question_changes(store, smoke, monkeypatch):
    s = store.spec(smoke, 'mufac', 2, 0, 'pretrain')
    make_runs(store, [s], 1)
    first = measure(store, portrait_similarity, [(s, {})], n_jobs=1)
    files = set((store.root / 'results').glob('*.json'))
    assert (
        measure(store, portrait_similarity, [(s, {})], n_jobs=1) == first
        and set((store.root / 'results').glob('*.json')) == files
    )
    measure(store, portrait_similarity, [(store.spec(smoke, 'mufac', 2, 1, 'pretrain'), {})], n_jobs=1)
    new = set((store.root / 'results').glob('*.json')) - files
    assert len(new) == 1
    f = files.pop(); f.write_text('{"torn')
    with pytest.raises(FacesError, match='Delete this file'):
        measure(store, portrait_similarity, [(s, {})], n_jobs=1)
    f.unlink()


def test_jobs_leave_threads_and_progress_as_they_were(store, smoke, monkeypatch):
    monkeypatch.setenv('ONESHUI_PROGRESS', 'text')
    torch.set_num_threads(2)
    make_runs(store, [store.spec(smoke, 'mufac', 2, 0, 'neggrad', dict(lr=.3))], 1)
    assert torch.get_num_threads() == 2 and os.environ['ONESHUI_PROGRESS'] == 'text'


def test_requests_in_turn(store, smoke):
    s = store.spec(smoke, 'celeba', 3, 0, 'neggrad', dict(lr=2.))
    make_runs(store, [s], 1)
    assert in_turn(store, s, [[0, 1, 2]])['tow'] == cell_metrics(store, s)['tow']
    assert in_turn(store, s, [[0], [1, 2]]) != in_turn(store, s, [[0, 1, 2]])
    small = store.spec(smoke, 'mufac', 3, 0, 'metaunlearn', smoke.hyper('mufac', 'metaunlearn', 2) | dict(simulated_size=2))
    assert store.prepared_of(small) == store.prepared_of(
        store.spec(smoke, 'mufac', 2, 0, 'metaunlearn')
    ), 'the state of the smaller request serves'


def test_another_portrait_is_judged_on_the_same_images(store, smoke):
    s = store.spec(smoke, 'celeba', 2, 0, 'neggrad', dict(lr=2.))
    found = {c: with_portrait(store, s, c) for c in analysis.PORTRAITS}
    assert len({q['images'] for q in found.values()}) == 1 and len({q['tow'] for q in found.values()}) > 1


def test_single_settings(smoke):
    assert (
        single_hyper(smoke, 'mufac', 'neggrad') == smoke.hyper('mufac', 'neggrad', 2)
        and single_hyper(smoke, 'mufac', 'metaunlearn')['simulated_size'] == 2
    )
    from oneshui.presets import load_preset
    assert single_hyper(load_preset('paper'), 'celebahq', 'metaunlearn')['simulated_size'] == 50


def test_differences_are_paired():
    t = pd.DataFrame(
        [
            dict(dataset='d', n_forget=1, seed=k, variant=v, retain=0.0, forget=0.0, test=0.0, tow=b + x)
            for k, b in enumerate((50.0, 70, 90))
            for v, x in (('base', 0.0), ('other', 1.0), ('noisy', (1.0, -1, 0)[k]))
        ]
    )
    n, rows = variant_table(t, 'base')
    n = n.set_index('variant')
    assert (
        n.loc['other', 'difference'] == 1
        and n.loc['other', 'difference_half'] == 0
        and rows.set_index('variant').loc['other', 'clear of 0'] == 'yes'
    )
    assert rows.set_index('variant').loc['noisy', 'clear of 0'] == 'no' and n.loc['base', 'tow_half'] > 40


def test_progress_is_zero_for_pretrain_and_one_for_retrain():
    rng = np.random.default_rng(0)
    d = pd.DataFrame(
        dict(
            dataset='d',
            n_forget=1,
            seed=0,
            person=np.arange(200) // 4,
            cosine=rng.random(200),
            images=4,
            pretrain=rng.random(200),
            retrain=2 + rng.random(200),
        )
    )
    for column, value in (('pretrain', 0), ('retrain', 1)):
        b = progress_by_bin(d.assign(method='m', loss=d[column]))
        b = b[b.bin != 'last − first']
        assert np.allclose(b[['progress', 'low', 'high']], value) and b.n.sum() == 200


def test_attacks_do_not_choose_on_what_they_report(store, smoke):
    grid = {('mufac', 3, k, m): store.spec(smoke, 'mufac', 3, k, m) for k in (0, 1) for m in ('pretrain', 'retrain')}
    make_runs(store, list(grid.values()), 1)
    t, scores = attack_runs(store, grid, 1, released=True)
    attacks = {'rmia', 'rmia_best', 'rmia_released', 'lira'}
    assert set(t.attack) == attacks and len(t) == 16 and {(key, a) for key in grid for a in attacks} == set(scores)
    from oneshui.attacks import RMIA_GRID, attack_summary
    found = dict(zip(grid, measure(store, analysis.rmia_scores, [(s, {}) for s in grid.values()], n_jobs=1)))
    auc = lambda k: {c: attack_summary(*map(np.array, v), boot=2)['auc'] for c, v in found['mufac', 3, k, 'pretrain'].items()}
    of = auc(1)
    assert of[t[(t.seed == 0) & (t.method == 'pretrain') & (t.attack == 'rmia')].setting.item()] == max(
        of.values()
    ), "seed 0's setting is seed 1's best"
    one, _ = attack_runs(store, {k: s for k, s in grid.items() if k[2] == 0}, 1)
    assert set(one[one.attack == 'rmia'].setting) == {'2,0.3'} and 'lira' not in set(one.attack)
