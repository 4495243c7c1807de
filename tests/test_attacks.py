"""Attacks on cases with a known answer, as functions of outputs; what they refuse."""
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from oneshui.attacks import (
    RMIA_GRID, attack_summary, augmented_logits, augmented_losses, confidence, lira,
    loss_mia, lowest_fpr, mia, rmia, rmia_grid, rmia_scores, roc)
from oneshui.core import DataError, PresetError
from oneshui.data import Pixels, make_request
from oneshui.metrics import METRICS, Outputs, task_loss
from oneshui.readers import read_faces
from oneshui.vit import ImageSet

loss = lambda *p: -np.log(np.array([p], float))


# ---- the loss

def test_loss_attack_knows_what_was_learned_by_heart():
    rng = np.random.default_rng(0)
    low, high = lambda n: rng.gamma(2, .05, n), lambda n: 1 + rng.gamma(2, .05, n)
    known = loss_mia(low(300), high(100), low(50), high(100), trees=(20,))
    assert (known['mia'], known['mia_nonmember']) == (100, 0)
    assert (known['released_mia'], known['released_mia_nonmember']) == (100, 0)
    blind = loss_mia(low(600), low(200), low(300), low(300))
    assert abs(blind['mia'] - 50) < 8


def test_loss_attack_does_not_choose_on_what_it_reports():
    rng = np.random.default_rng(0)
    fit, ask = (rng.gamma(2, 1, 80), rng.gamma(3, 1, 80)), rng.gamma(2, 1, (2, 60))
    ours, grid = loss_mia(*fit, *ask), []
    for c in ('gini', 'entropy'):
        for n in (20, 50, 100): grid.append(loss_mia(*fit, *ask, (n,), (c,)))
    most = max(g['mia_nonmember'] for g in grid)
    assert ours['released_mia_nonmember'] == most, 'the released choice looks at D_f'
    chosen = [loss_mia(*fit, *other)['mia'] for other in (ask, ask[::-1])]
    assert any(g['mia'] == chosen[0] for g in grid)
    assert sum(chosen) == pytest.approx(100)


def test_loss_attack_survives_a_broken_model():
    broken = np.array([np.nan, np.inf, -np.inf, .1, .2, .3])
    assert all(np.isfinite(v) for v in loss_mia(*[broken] * 4, trees=(20,)).values())


# ---- RMIA

def test_rmia_on_four_points_by_hand():
    # ratios p(x|θ)/p(x) with a = 1: questioned 2, 1; population 1, 2
    x, z = (loss(.8, .4), loss(.4, .4)), (loss(.5, .5), loss(.5, .25))
    assert rmia(x, z, .999, 1).tolist() == [1, .5]
    assert rmia(x, z, 1.999, 1).tolist() == [.5, 0]
    # a = 0: p(x) = (p_ref + 1)/2 = .7, .7; .75, .625; ratios 1.143, .571; .667, .8
    assert rmia(x, z, 1, 0).tolist() == [1, 0]
    assert rmia(x, z, 1.5, 0).tolist() == [.5, 0]


def test_rmia_votes_need_more_than_half_of_the_views():
    z, ref = (loss(.5), loss(.5)), np.repeat(loss(.5), 4, 0)
    ask = lambda *p: rmia((loss(*p).T, ref), z, 1.2, 1)
    assert ask(.9, .9, .9, .1) == 1 and ask(.9, .9, .1, .1) == 0, 'a tie is no'


def test_rmia_blocks_and_sorted_list_agree():
    rng = np.random.default_rng(0)
    draw = lambda *s: (rng.gamma(2, .3, s), rng.gamma(2, .3, s))
    X, Z = draw(8, 50), draw(1, 200)
    Z8 = tuple(np.repeat(z, 8, 0) for z in Z)
    for g, a in RMIA_GRID: assert np.array_equal(rmia(X, Z, g, a), rmia(X, Z8, g, a))


@pytest.mark.parametrize('signal', ['likelihood', 'loss'])
def test_rmia_survives_a_broken_model(signal):
    broken = (np.array([[np.nan, np.inf, 0.]]),) * 2
    assert np.isfinite(rmia(broken, broken, signal=signal)).all()


def test_rmia_refuses_wrong_shapes_and_signals():
    two, eight = (np.ones((2, 3)),) * 2, (np.ones((8, 3)),) * 2
    with pytest.raises(DataError, match='8 views and the questioned images 2'):
        rmia(two, eight)
    with pytest.raises(PresetError, match='"logit". Valid: likelihood, loss'):
        rmia(two, two, signal='logit')


# ---- ROC

def test_roc_and_summary_against_sklearn_with_ties():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, 80) + 1., rng.integers(0, 6, 150) * 1.
    r = attack_summary(a, b, boot=50)
    auc = 100 * roc_auc_score([1] * 80 + [0] * 150, [*a, *b])
    assert r['auc'] == pytest.approx(auc)
    assert (r['fpr'], r['n_members'], r['n_others']) == (1, 80, 150)
    fpr, tpr = (v[0] for v in roc(a, b))
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    caught = attack_summary(np.array([2., 1]), np.zeros(400), boot=2)
    assert caught['tpr'] == 100, 'recognised without a false alarm'


DECADES = [(9, .1), (100, .01), (9_999, 1e-3), (10_000, 1e-4), (10 ** 7, 1e-4)]


@pytest.mark.parametrize('n, f', DECADES)
def test_lowest_fpr(n, f): assert lowest_fpr(n) == f


def test_interval_covers_a_known_auc():
    hits = 0
    for k in range(60):
        rng = np.random.default_rng(k)
        a, b = rng.normal(1, 1, 60), rng.normal(0, 1, 120)
        r = attack_summary(a, b, boot=300, seed=k)
        hits += r['auc_low'] < 76.02 < r['auc_high']   # Φ(1/√2)
    assert hits >= 50, hits


def test_intervals_over_people_are_wider_than_over_their_copies():
    rng, three = np.random.default_rng(0), np.repeat(np.arange(60), 3)
    a, b = (np.repeat(rng.normal(m, 1, 60), 3) for m in (1, 0))
    def width(people):
        r = attack_summary(a, b, people, boot=300)
        return r['auc_high'] - r['auc_low']
    assert width((three, three)) > 1.4 * width(None)


# ---- LiRA

to_loss = lambda φ: np.log1p(np.exp(-np.asarray(φ, float)))


def test_lira_by_hand():
    φ, was = np.array([[3.], [5.], [0.], [2.]]), np.array([[1], [1], [0], [0]], bool)
    assert lira(to_loss([4.]), to_loss(φ), was) == pytest.approx(2.25)


def test_lira_borrows_the_gap_for_an_image_that_all_have_seen():
    φ = np.array([[3., 7.], [5., 9.], [0., 8.], [2., 8.]])
    was = np.array([[1, 1], [1, 1], [0, 1], [0, 1]], bool)
    found = lira(to_loss([4., 8.]), to_loss(φ), was)
    # in: 4 and 8, mean 6; out: 1 and none; the gap is 5, so out of the second is 3
    assert np.isfinite(found).all() and (found > 0).all()
    assert lira(to_loss([4., 3.]), to_loss(φ), was)[1] < 0


def test_lira_sees_one_image_where_the_average_is_blind():
    rng = np.random.default_rng(0)
    was = rng.random((6, 500)) < .5
    φ = rng.normal(0, 3, 500) + rng.normal(0, .3, was.shape) + was
    l = to_loss(φ)
    assert np.allclose(confidence(l), φ)
    s = lira(l[0], np.where(rng.random((5, 500)) < .3, np.nan, l[1:]), was[1:])
    auc = lambda score: roc_auc_score(was[0], score)
    assert np.isfinite(s).all() and auc(s) > .9 > .65 > auc(-l[0])
    with pytest.raises(DataError, match='were not'): lira(l[0], l[1:], was[1:] | True)


# ---- as functions of outputs

def outputs(seed, n=30):
    "Random logits of four classes on every set, and eight views of two."
    g, same = (torch.Generator().manual_seed(k) for k in (seed, 9))
    sets = ('support', 'forget', 'retain', 'val', 'test')
    y = {d: torch.randint(0, 4, (n,), generator=same) for d in sets}
    logits = {d: torch.randn(n, 4, generator=g) for d in sets}
    views = {d: torch.randn(8, n, 4, generator=g) for d in ('forget', 'test')}
    return Outputs(logits, y, {d: np.arange(n) for d in sets}, views)


def test_metrics_say_what_they_need():
    loss, population = METRICS['mia'], METRICS['rmia_scores']
    assert (loss.needs, loss.views) == ((), 0)
    assert (population.needs, population.views) == (('reference',), 8)


def test_mia_metric_is_the_attack_on_stored_losses():
    run = outputs(0)
    l = {d: task_loss(run.logits[d], run.targets[d], 'none') for d in run.logits}
    assert mia(run) == loss_mia(l['retain'], l['val'], l['forget'], l['test'])


def test_rmia_metric_is_the_attack_on_stored_views():
    run, ref = outputs(0), outputs(1)
    found = rmia_scores(run, reference=ref)
    assert list(found) == [f'{g},{a}' for g, a in RMIA_GRID]
    plain = lambda r: np.concatenate([r.loss(d) for d in ('val', 'retain', 'forget')])
    asked = [(run.view_loss(d), ref.view_loss(d)) for d in ('forget', 'test')]
    assert found == rmia_grid(asked, (plain(run), plain(ref))), 'whatever the order'
    assert [len(x) for x in found['1,0.2']] == [30, 30]


# ---- views

@pytest.fixture(scope='module')
def few(data_dir):
    faces = read_faces('mufac', data_dir)
    return ImageSet(Pixels(faces, 32, None), make_request(faces, 2, 0).test[:10])


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))


@pytest.mark.parametrize('crop', [1, .3])
def test_views_are_the_same_for_every_model_and_leave_no_trace(few, crop):
    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    a, b = net(0), net(1)
    both = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16))
    both[1].weight.data = torch.cat([a[1].weight, b[1].weight]).detach()
    both[1].bias.data = torch.cat([a[1].bias, b[1].bias]).detach()
    torch.manual_seed(5)
    one, two, joint = (augmented_logits(m, few, crop, 3, 7) for m in (a, b, both))
    assert torch.equal(torch.rand(3), undisturbed), 'as if nothing had been drawn'
    assert one.shape == (3, 10, 8)
    assert torch.allclose(torch.cat([one, two], 2), joint, atol=1e-5)
    assert not torch.equal(one, augmented_logits(a, few, crop, 3, 8)), 'another seed'


def test_flips_show_an_image_as_it_is_or_mirrored(few):
    model, (x, _) = net(0), few.tensors()
    views = augmented_logits(model, few, 1, 20, 0)
    plain, mirrored = model(x).detach(), model(x.flip(-1)).detach()
    same = lambda v: torch.isclose(views, v, atol=1e-5).all(2)
    assert (same(plain) | same(mirrored)).all()
    assert .3 < same(plain).float().mean() < .7
    losses = augmented_losses(model, few, 1, 20, 0)
    assert np.allclose(losses[3], task_loss(views[3], few.y, 'none'))
