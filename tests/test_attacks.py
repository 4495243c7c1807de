"""Attacks on cases with a known answer, and the shapes they refuse."""
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from oneshui.attacks import RMIA_GRID, attack_summary, confidence, lira, lowest_fpr, rmia, roc

loss = lambda *p: -np.log(np.array([p], float))


def test_rmia_on_four_points_by_hand():
    # ratios p(x|θ)/p(x) with a = 1: questioned 2, 1; population 1, 2
    x, z = (loss(.8, .4), loss(.4, .4)), (loss(.5, .5), loss(.5, .25))
    assert rmia(x, z, .999, 1).tolist() == [1, .5] and rmia(x, z, 1.999, 1).tolist() == [.5, 0]
    # a = 0: p(x) = (p_ref + 1)/2 = .7, .7 and .75, .625; ratios 1.143, .571 and .667, .8
    assert rmia(x, z, 1, 0).tolist() == [1, 0] and rmia(x, z, 1.5, 0).tolist() == [.5, 0]


def test_rmia_votes_need_more_than_half_of_the_views():
    z = (loss(.5), loss(.5)); ref = np.repeat(loss(.5), 4, 0)
    view = lambda *p: (-np.log(np.array(p, float))[:, None], ref)
    assert rmia(view(.9, .9, .9, .1), z, 1.2, 1) == 1 and rmia(view(.9, .9, .1, .1), z, 1.2, 1) == 0, 'a tie is no'


def test_rmia_blocks_and_sorted_list_agree(monkeypatch):
    rng = np.random.default_rng(0)
    d = lambda *s: rng.gamma(2, .3, s)
    X, Z = (d(8, 50), d(8, 50)), (d(1, 200), d(1, 200))
    Z8 = tuple(np.repeat(z, 8, 0) for z in Z)
    for g, a in RMIA_GRID: assert np.array_equal(rmia(X, Z, g, a), rmia(X, Z8, g, a))


def test_rmia_survives_a_broken_model_and_refuses_wrong_shapes():
    broken = np.array([[np.nan, np.inf, 0.]])
    assert (
        np.isfinite(rmia((broken, broken), (broken, broken))).all()
        and np.isfinite(rmia((broken, broken), (broken, broken), signal='loss')).all()
    )
    with pytest.raises(ValueError, match='8 views'):
        rmia((np.ones((2, 3)), np.ones((2, 3))), (np.ones((8, 3)), np.ones((8, 3))))
    with pytest.raises(ValueError, match='likelihood, loss'):
        rmia((broken, broken), (broken, broken), signal='logit')


def test_roc_and_summary_against_sklearn_with_ties():
    rng = np.random.default_rng(1); a, b = rng.integers(0, 6, 80) + 1., rng.integers(0, 6, 150) * 1.
    r = attack_summary(a, b, boot=50)
    assert (
        np.isclose(r['auc'], 100 * roc_auc_score([1] * 80 + [0] * 150, [*a, *b]))
        and r['fpr'] == 1
        and (r['n_members'], r['n_others']) == (80, 150)
    )
    fpr, tpr = (v[0] for v in roc(a, b))
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1) and (np.diff(fpr) >= 0).all()
    assert attack_summary(np.array([2., 1]), np.zeros(400))['tpr'] == 100, 'recognised without a false alarm'


@pytest.mark.parametrize('n, f', [(9, .1), (100, .01), (9_999, 1e-3), (10_000, 1e-4), (10 ** 7, 1e-4)])
def test_lowest_fpr(n, f): assert lowest_fpr(n) == f


def test_interval_covers_a_known_auc():
    hits = 0
    for k in range(60):
        rng = np.random.default_rng(k)
        r = attack_summary(rng.normal(1, 1, 60), rng.normal(0, 1, 120), boot=300, seed=k)
        hits += r['auc_low'] < 76.02 < r['auc_high']
    assert hits >= 50, hits


def test_lira_sees_one_image_where_the_average_is_blind():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 3, 500)
    was = rng.random((6, 500)) < .5
    φ = hard + rng.normal(0, .3, was.shape) + was
    l = np.log1p(np.exp(-φ))
    assert np.allclose(confidence(l), φ)
    s = lira(l[0], np.where(rng.random((5, 500)) < .3, np.nan, l[1:]), was[1:])
    assert np.isfinite(s).all() and roc_auc_score(was[0], s) > .9 > .65 > roc_auc_score(was[0], -l[0])
    with pytest.raises(ValueError, match='were not'): lira(l[0], l[1:], np.ones((5, 500), bool))
