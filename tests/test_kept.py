"""What is kept to forget with: directions, stand-ins, bytes, and what comes of it."""
import numpy as np
import pandas as pd
import pytest
import torch

from oneshui.kept import (
    after_keeping,
    as_made,
    away_from,
    bytes_kept,
    bytes_of_method,
    kept_arms,
    named,
    opened,
    pairs,
    read_search,
    searched_lengths,
    sketch,
    stand_ins,
    told_apart,
)
from oneshui.kit import readable
from oneshui.questions import task_gradient


@pytest.fixture(scope='module')
def idle(smoke, shared): return shared.spec(smoke, 'celeba', 2, 0, 'pretrain')


def test_a_sketch_is_the_best_of_its_size():
    g = torch.randn(500, generator=torch.Generator().manual_seed(0))
    kept = sketch(g, 50)
    assert sum(t.nbytes for t in kept.values()) == 50 * 6
    away = opened(kept, 500) - g
    rest = g.abs().sort().values[:450]
    assert away.norm() == pytest.approx(rest.norm().item(), rel=1e-3)
    assert torch.equal(opened(sketch(g, 10_000), 500), g.bfloat16().float())


def test_a_step_along_the_portraits_is_neggrad(smoke, shared, idle):
    s = shared.spec(smoke, 'celeba', 2, 0, 'neggrad')
    model, D = shared.get(idle).model(), shared.sets(idle)
    length = s.hyper['lr'] * away_from(model, D, 'portrait').norm().item()
    found = after_keeping(shared, idle, 'portrait', 0, length)
    assert found == pytest.approx(as_made(shared, s), abs=1e-2)


def test_nothing_kept_but_others_is_training_on(shared, idle):
    still = after_keeping(shared, idle, 'nothing', 'all', steps=1, lr=1e-9)
    assert still == pytest.approx(as_made(shared, idle), abs=1e-2)


def test_everybody_who_asks_counts_alike(shared, idle):
    model, D = shared.get(idle).model(), shared.sets(idle)
    F = D['forget']
    each = [task_gradient(model, F, np.flatnonzero(F.identity == who))
            for who in np.unique(F.identity)]
    assert torch.allclose(away_from(model, D, 'gradient'), sum(each))
    d = len(each[0])
    sketched = away_from(model, D, d)   # all entries, rounded
    assert torch.cosine_similarity(sketched, sum(each), 0) > .9999


def test_the_control_is_as_many_people_who_stay(shared, idle):
    model, D = shared.get(idle).model(), shared.sets(idle)
    control = away_from(model, D, 'stay')
    R, asked = D['retain'], np.unique(D['forget'].identity)
    each = [task_gradient(model, R, np.flatnonzero(R.identity == who))
            for who in np.unique(R.identity)]
    part = torch.linalg.lstsq(torch.stack(each).T.double(), control.double()[:, None])
    share = part.solution[:, 0]          # whose gradients were summed
    assert torch.allclose(share, share.round(), atol=1e-3)
    assert share.round().sum() == len(asked)
    assert torch.equal(control, away_from(model, D, 'stay'))
    whole = shared.get(idle), bytes_kept(shared, idle, 'gradient', 0)
    assert bytes_kept(shared, idle, 'stay', 0) == whole[1]


def test_the_runs_of_the_tables_keep_their_scores(smoke, shared):
    s = shared.spec(smoke, 'celeba', 2, 0, 'retrain')
    assert as_made(shared, s)['tow'] == 100
    s = shared.spec(smoke, 'celeba', 2, 0, 'pgu')
    theirs, found = shared.metrics(s), as_made(shared, s)
    assert {k: found[k] for k in ('retain', 'forget', 'test', 'tow')} == pytest.approx(
        {k: theirs[k] for k in ('retain', 'forget', 'test', 'tow')})


def test_losses_tell():
    low, high = np.array([.1, .2]), np.array([.3, .4, .5])
    assert told_apart(low, high) == 100 and told_apart(high, low) == 0
    assert told_apart(high, high) == 50


def test_stand_ins_are_nested_and_no_more_than_there_are(shared, idle):
    retain = shared.sets(idle)['retain']
    rows = [{*stand_ins(retain, k, 3).idx} for k in (3, 9, 10_000)]
    assert rows[0] < rows[1] < rows[2] == {*retain.idx}
    assert {*stand_ins(retain, 9, 4).idx} != rows[1]


def test_bytes_are_counted(smoke, shared, idle):
    r, pixels = shared.request(idle), 3 * 32 * 32
    people = len({*shared.faces('celeba').identity[r.train]})
    assert bytes_kept(shared, idle, 'portrait', 0) == 0
    assert bytes_kept(shared, idle, 100, 5) == 600 + 5 * pixels / people
    parameters = sum(p.numel() for p in shared.get(idle).model().parameters())
    assert bytes_kept(shared, idle, 'gradient', 0) == 4 * parameters
    everything = bytes_kept(shared, idle, 'nothing', 'all')
    assert everything == len(r.retain) * pixels / people
    ask = lambda m: bytes_of_method(shared, shared.spec(smoke, 'celeba', 2, 0, m))
    assert ask('neggrad') == 0
    assert ask('ssd') == pytest.approx(4 * parameters / people)
    assert ask('scrub') == len(r.train) * pixels / people
    assert [readable(x) for x in (12, 6e3, 3.25e6)] == ['12 B', '6 kB', '3.25 MB']


def test_a_search_is_made_on_the_tuning_seed_and_read_again(smoke, shared, tmp_path):
    asked = [('portrait', 0), (100, 5)]
    t = searched_lengths(shared, smoke, ('celeba', 2), asked, n_jobs=1)
    assert t.groupby(['person', 'others']).chosen.sum().eq(1).all()
    s = shared.spec(smoke, 'celeba', 2, smoke.tuning_seed, 'pretrain')
    again = after_keeping(shared, s, **t.iloc[5][['person', 'others', 'length']])
    assert t.tow[5] == pytest.approx(again['tow'])
    t.to_csv(tmp_path / 'search.csv', index=False)
    pd.testing.assert_frame_equal(read_search(tmp_path / 'search.csv'), t,
                                  check_dtype=False)


def test_an_arm_for_everything_that_may_be_kept(smoke, shared):
    kept = pairs(('nothing', 100), (0, 5))
    assert kept == [('nothing', 5), (100, 0), (100, 5)]
    lengths = dict.fromkeys(kept, .1)
    arms = kept_arms(shared, smoke, ('celeba', 2), [0], lengths, ('pgu',))
    assert list(arms) == ['pgu', *(named(*k) for k in kept)]
    assert arms['100 + 5'][0].options == dict(person=100, others=5, length=.1)
