"""Worlds: what they change, what is said of them, and where a step points."""
import numpy as np
import pandas as pd
import pytest

from oneshui.experiments import compare_arms, variants
from oneshui.regimes import (PUBLISHED, World, longer, points, searched, settle,
                             step_direction, with_more_requests)
from oneshui.tuning import with_settings


def test_a_world_differs_in_what_it_says_and_in_nothing_else(
        smoke, shared, tmp_path, monkeypatch):
    monkeypatch.setattr('oneshui.regimes.project_root', lambda: tmp_path)
    world = World(likeness=0., people=9, images=(3, 4), epochs=5)
    there, preset = settle(shared, smoke, 'celeba', world, n_jobs=1)
    faces = there.faces('celeba')
    assert len(faces.identities) == 9 and {*faces.count} <= {3, 4}
    assert there.root == shared.root and preset.recipe('celeba').epochs == 5
    assert preset.model_copy(update=dict(train=smoke.train)) == smoke
    same, _ = settle(shared, smoke, 'celeba', World(), n_jobs=1)
    assert same.faces('celeba').fingerprint == shared.faces('celeba').fingerprint


def test_points_are_gains_over_doing_nothing():
    def row(label, tow, forget):
        where = dict(dataset='celeba', n_forget=5, seed=0, request=0)
        return where | dict(label=label, tow=tow, forget=forget, retain=60., test=50.)
    scores = pd.DataFrame([row('pretrain', 85., 70.), row('retrain', 100., 55.),
                           row('a', 90., 62.), row('b', 80., 40.)])
    found = points(compare_arms(scores, 'pretrain')).set_index('label')
    assert found.gain.to_dict() == dict(a=5., b=-5.)
    assert (found.room == 15).all() and (found.gap == 15).all()


def test_a_candidate_gains_over_doing_nothing_on_the_tuning_requests(smoke, shared):
    few = smoke.model_copy(update=dict(requests=1))
    t = searched(shared, few, 'celeba', n_jobs=1)
    assert t.method.value_counts().to_dict() == dict(neggrad=9, metaunlearn=9)
    assert t.groupby('method').chosen.sum().eq(1).all() and (t.requests == 1).all()
    floor = shared.metrics(shared.spec(few, 'celeba', 2, few.tuning_seed, 'pretrain'))
    assert np.allclose(t.gain, t.tow - floor['tow'])


def test_one_step_of_ascent_points_where_the_portraits_do(smoke, shared):
    s = shared.spec(smoke, 'celeba', 2, 0, 'neggrad')
    found = step_direction(shared, s)
    assert found['support'] == pytest.approx(1, abs=1e-3) and found['length'] > 0
    assert abs(found['retain']) < .999


def test_more_simulated_requests_are_more_passes_over_the_people(smoke, shared):
    few, cell = smoke.model_copy(update=dict(requests=1)), ('celeba', 2)
    t = longer(shared, few, cell, 6, n_jobs=1)
    assert len(t) == 8 and t.A_last.gt(0).all() and t.A_first.nunique() > 1
    tuned = with_settings(few, t)
    short = variants(shared, few, [cell], [0],
                     {'metaunlearn': {}, 'as published': PUBLISHED})
    both = with_more_requests(shared, tuned, cell, [0], 12, short, 1)
    assert (both.simulated[both.over.isna()] == 6).all() and len(both) == 4
    seen = both[both.over.notna()].set_index('label')
    found = tuned.hyper('celeba', 'metaunlearn', 2)
    epochs = dict(epochs=int(seen.simulated.iloc[0]) // 6)
    assert epochs['epochs'] == 2 > found['epochs'] == 1
    for label, s in dict(metaunlearn={}, **{'as published': PUBLISHED}).items():
        spec = shared.spec(few, *cell, 0, 'metaunlearn', found | s | epochs)
        assert shared.has(spec)
        made = shared.prepared(spec)[0]
        assert len(made['history']) == seen.simulated[label]
        before = shared.metrics(short[label][0])['tow']
        assert seen.over[label] == pytest.approx(shared.metrics(spec)['tow'] - before)
