"""Attacks on cases with a known answer, as functions of outputs; what they refuse."""
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from oneshui.attacks import (
    OFFLINE_A, RMIA_GRID, attack_summary, auc_of_scales, augmented_logits,
    augmented_losses, clopper_pearson, confidence, lira, log_ratio, loss_mia,
    lowest_fpr, mia, rmia, rmia_against, rmia_scales, rmia_scores, roc)
from oneshui.core import DataError, PresetError
from oneshui.data import Pixels, make_request
from oneshui.metrics import METRICS, Outputs, task_loss
from oneshui.oracles import against_oracles, epsilon_of, epsilons, forgetting_quality
from oneshui.oracles import klom, proven, thresholds, u_lira, windows
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


def test_the_criterion_of_a_forest_is_no_choice():
    "On one feature both grow the same leaves: ties, tiny gaps and plateaus included."
    for seed, scale in enumerate((1, 1, 1e-5, 1)):
        rng = np.random.default_rng(seed)
        losses = lambda n: rng.gamma(2, .2, n).astype(np.float32) * scale
        sets = list(map(losses, (90, 60, 40, 40)))
        if seed == 1: sets = [s.round(2) for s in sets]
        if seed == 3: sets[0][:30] = np.inf
        gini, entropy = (loss_mia(*sets, trees=(20,), criteria=(c,))
                         for c in ('gini', 'entropy'))
        assert gini == entropy


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


def test_rmia_averages_the_likelihoods_of_k_references_and_divides_once():
    own, out = loss(.9), [loss(p) for p in (.2, .4, .6)]
    for a in (0, .3, 1):   # p(x) = ½((1 + a)·0.4 + 1 − a)
        by_hand = .9 / (.5 * ((1 + a) * .4 + 1 - a))
        assert np.exp(log_ratio((own, *out), a)) == pytest.approx(by_hand)
    mean = loss(.4)   # of likelihoods: not the mean of losses
    assert np.allclose(log_ratio((own, *out), .7), log_ratio((own, mean), .7))


def test_a_likelihood_of_attributes_is_their_geometric_mean():
    lo, y = torch.tensor([[0., 2.]]), torch.tensor([[1., 0.]])
    each = [.5, 1 - 1 / (1 + np.exp(-2))]
    likelihood = np.exp(-task_loss(lo, y, 'none').numpy())
    assert likelihood == pytest.approx(np.sqrt(np.prod(each)), abs=1e-6)


def test_offline_scale_is_the_one_that_does_best():
    members, others = [3., 2], [1., 0]
    found = {'0': (others, members), '0.5': (members, others), '1': (members, members)}
    assert auc_of_scales(found) == {'0': 0, '0.5': 1, '1': .5}
    assert OFFLINE_A == (0, .1, .2, .3, .4, .5, .6, .7, .8, .9, 1)


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

def test_clopper_and_pearson_by_hand():
    for n in (1, 10, 40):   # nobody, everybody: (1 − p)^n and p^n are 2.5 %
        none, every = clopper_pearson(0, n), clopper_pearson(n, n)
        assert none == pytest.approx((0, 1 - .025 ** (1 / n)))
        assert every == pytest.approx((.025 ** (1 / n), 1))
    low, high = clopper_pearson(3, 10)   # one sees 3 and more in 2.5 %, one 3 and less
    hits = lambda rate: np.random.default_rng(0).binomial(10, rate, 200_000)
    assert (hits(low) >= 3).mean() == pytest.approx(.025, abs=.002)
    assert (hits(high) <= 3).mean() == pytest.approx(.025, abs=.002)


def test_bounds_of_the_tpr_count_people():
    a, b, who = np.repeat([3., 1.], 6), np.zeros(400), np.repeat(np.arange(4), 3)
    b[:8] = 2   # more than one false alarm: at most 3 is above them
    images = attack_summary(a, b, boot=2)
    people = attack_summary(a, b, (who, np.arange(400)), boot=2)
    assert images['tpr'] == people['tpr'] == 50
    assert images['tpr_low'] == pytest.approx(100 * clopper_pearson(6, 12)[0])
    assert people['tpr_low'] == pytest.approx(100 * clopper_pearson(2, 4)[0])



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


@pytest.mark.parametrize('broken', [np.nan, -np.inf])
def test_a_broken_model_knows_nobody(broken):
    seen = attack_summary(np.full(12, broken), np.full(40, broken), boot=2)
    assert seen['auc'] == 50
    some = np.array([3., broken, broken]), np.array([1., 2.])
    assert attack_summary(*some, boot=2)['auc'] == pytest.approx(100 / 3)
    lost = np.full((3, 5), np.nan)
    assert np.isfinite(confidence(lost)).all()
    assert against_oracles(confidence(lost), confidence(np.ones((3, 5))))['klom'] > 0


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

def test_confidence_is_the_logit_of_the_likelihood():
    φ = np.array([-3., 0, 5])
    assert np.allclose(confidence(np.log1p(np.exp(-φ))), φ)


def test_lira_by_hand():
    φ, was = np.array([[3.], [5.], [0.], [2.]]), np.array([[1], [1], [0], [0]], bool)
    assert lira(np.array([4.]), φ, was) == pytest.approx(2.25)
    with pytest.raises(PresetError, match='"in". Valid: both, out, above'):
        lira(np.array([4.]), φ, was, 'in')


# Cases of tensorflow/privacy (advanced_mia_test.py): four images, shadows −1 and 1; 0
# and 2; 0 and 20; none. Theirs is log Pr(out) − log Pr(in), small for members.
TARGET = np.array([1., 0, 0, 0])
SHADOWS = np.array([[-1., 0, 0, np.nan], [1, 2, 20, np.nan]])
EACH = np.array([1.41893853, 1.41893853, 3.72152363, 2.72537178])
FIXED = np.array([2.69682468, 2.69682468, 4.15270703, 2.87983121])


@pytest.mark.parametrize('pooled, case', [(False, EACH), (True, FIXED)])
def test_lira_on_published_cases(pooled, case):
    never = np.zeros((2, 4), bool)
    ask = lambda φ: lira(TARGET, φ, never, 'out', pooled, ddof=0)
    assert np.allclose(ask(-SHADOWS), case), 'ours is minus theirs: large is a member'
    with pytest.raises(DataError, match='not'): lira(TARGET, SHADOWS, ~never, 'out')
    both = np.concatenate([SHADOWS, -SHADOWS])
    was = np.repeat([True, False], 2)[:, None] & np.ones((1, 4), bool)
    # in and out mirror each other; without shadows the mean of the others, ± 11/3
    assert np.allclose(lira(TARGET, both, was, 'both', pooled, ddof=0)[1:], 0)


@pytest.mark.parametrize('pooled', [False, True])
def test_lira_on_the_published_case_of_two_views(pooled):
    views = [lira(np.array([x]), -np.array(s)[:, None], np.zeros((2, 1), bool), 'out',
                  pooled, ddof=0) for x, s in ((1., (-1., 1.)), (0., (0., 20.)))]
    assert np.mean(views) == pytest.approx(2.57023108)


def test_lira_has_the_sign_of_membership():
    rng = np.random.default_rng(0)
    φ, was = rng.normal(0, 1, (8, 50)), np.repeat([True, False], 4)[:, None]
    was = was & np.ones((1, 50), bool)
    φ[:4] += 4
    inside, outside = np.full(50, 4.), np.zeros(50)
    for side in ('both', 'out', 'above'):
        member, stranger = (lira(x, φ, was, side).mean() for x in (inside, outside))
        assert member > stranger, side


def test_lira_borrows_the_gap_for_an_image_that_all_have_seen():
    φ = np.array([[3., 7.], [5., 9.], [0., 8.], [2., 8.]])
    was = np.array([[1, 1], [1, 1], [0, 1], [0, 1]], bool)
    found = lira(np.array([4., 8.]), φ, was)
    # in: 4 and 8, mean 6; out: 1 and none; the gap is 5, so out of the second is 3
    assert np.isfinite(found).all() and (found > 0).all()
    assert lira(np.array([4., 3.]), φ, was)[1] < 0


def test_lira_sees_one_image_where_the_average_is_blind():
    rng = np.random.default_rng(0)
    was = rng.random((6, 500)) < .5
    φ = rng.normal(0, 3, 500) + rng.normal(0, .3, was.shape) + was
    s = lira(φ[0], np.where(rng.random((5, 500)) < .3, np.nan, φ[1:]), was[1:])
    auc = lambda score: roc_auc_score(was[0], score)
    assert np.isfinite(s).all() and auc(s) > .9 > .65 > auc(φ[0])
    with pytest.raises(DataError, match='were not'): lira(φ[0], φ[1:], was[1:] | True)


# ---- many models of a kind

def draw(models, mean=0., images=40, seed=0):
    return np.random.default_rng([seed, models]).normal(mean, 1, (models, images))


@pytest.mark.parametrize('models', [2, 4, 16])
def test_u_lira_finds_nothing_where_nothing_is(models):
    auc = []
    for k in range(12):
        scores = u_lira(draw(models, seed=k), draw(models, seed=100 + k))
        auc.append(attack_summary(*(x.ravel() for x in scores), boot=2)['auc'])
    assert abs(np.mean(auc) - 50) < 3


def test_u_lira_finds_what_is_known_and_what_is_known_too_little():
    for mean in (8., -8.):   # remembered; forgotten far below Retrain
        members, others = u_lira(draw(4, mean), draw(4, seed=1))
        assert members.shape == others.shape == (4, 40)
        assert attack_summary(members.ravel(), others.ravel(), boot=2)['auc'] == 100
    with pytest.raises(DataError, match='as many'): u_lira(draw(3), draw(4))
    with pytest.raises(DataError, match='two at least'): u_lira(draw(1), draw(1))


def test_u_lira_leaves_out_the_judged_model_and_its_namesake():
    φ = np.array([[0.], [2], [4]]), np.array([[10.], [12], [14]])
    members, others = u_lira(*φ)
    was = np.array([[1], [1], [0], [0]], bool)
    mine = lira(np.array([2.]), np.array([[0.], [4], [10], [14]]), was)
    assert members[1] == pytest.approx(mine)
    theirs = lira(np.array([14.]), np.array([[0.], [2], [10], [12]]), was)
    assert others[2] == pytest.approx(theirs)


def test_epsilon_of_an_attacker_by_hand():
    half = proven(np.array([.5]), np.array([.5]))
    assert half[0] == 0, 'a coin proves nothing'
    assert proven(np.array([.25]), np.array([.25]))[0] == pytest.approx(
        np.log((1 - 1e-5 - .25) / .25))
    assert np.isinf(proven(np.zeros(1), np.zeros(1)))[0]
    assert np.isnan(proven(np.zeros(1), np.array([.2])))[0], 'too few to err both ways'


def test_epsilon_by_hand():
    # four models each; the best threshold lets one pass on either side: log 3
    u, r = np.array([1., 3., 4., 5.]), np.array([0., 0.5, 1.5, 3.5])
    points, _ = thresholds(u, r)
    assert len(points) == 500 and (points[0], points[-1]) == (0, 5)
    assert epsilon_of(u, r) == epsilon_of(r, u) == pytest.approx(np.log(3), abs=1e-4)
    low, high = windows(np.array([0., 1.]))
    assert len(low) == 400 ** 2 and (high.min(), high.max()) == (-1, 3)
    assert ((high - low) >= -1).all() and ((high - low) <= 3.0001).all()


def test_epsilon_knows_the_ends():
    same = draw(64, images=5)
    assert (epsilons(same, same + 50) == 50).all(), 'told apart without an error'
    assert (epsilons(same, same) < 1.5).all()
    assert epsilon_of(same[:, 0], np.full(64, .3)) == 50, 'always the same answer'
    rng = np.random.default_rng(0)
    heaps = rng.normal(0, .3, 64) + np.repeat([-4, 4], 32)
    assert epsilon_of(heaps, same[:, 0]) > 2.5, 'only a window tells'


def test_buckets_of_the_forgetting_quality():
    # 512 models: ⌈log 511⌉ = 7, fourteen buckets of one half
    at = lambda *ε, m=512: forgetting_quality(np.array(ε), m)
    assert [at(e) for e in (0, .49, .5, 1.2, 6.99, 7)] == [1, 1, .5, .25, 2 ** -13, 0]
    assert at(0., .5, 50.) == .5
    assert at(1.9, m=4) == 2 ** -3 and at(2., m=4) == 0, '⌈log 3⌉ = 2: four buckets'


def test_klom_by_hand_and_at_its_ends():
    four = lambda *x: np.array(x, float)[:, None]
    kl = klom(four(0, 0, 1, 1), four(0, 1, 1, 1))[0]
    assert kl == pytest.approx(.5 * np.log(.5 / .25) + .5 * np.log(.5 / .75))
    assert klom(four(0, 1, 2), four(0, 1, 2))[0] == 0
    assert klom(four(5, 5), four(0, 0))[0] == pytest.approx(np.log(1 / 1e-5))
    assert klom(four(900, 900), four(700, 700))[0] == 0, 'margins are cut at 100'
    near, far = (klom(draw(2000, μ), draw(2000, seed=1)).mean() for μ in (0., 1.))
    assert near < .02 and far == pytest.approx(.5, abs=.15), '½ nat between the normals'


def test_all_measures_of_many_models_order_alike():
    found = [against_oracles(draw(64, μ, 8), draw(64, 0, 8, 1)) for μ in (0, 1, 4)]
    assert set(found[0]) == {'epsilon', 'quality', 'klom', 'klom_95'}
    for k in ('epsilon', 'klom', 'klom_95'):
        assert found[0][k] < found[1][k] < found[2][k]
    assert found[0]['quality'] > found[2]['quality']


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
    run, ref, other = outputs(0), outputs(1), outputs(2)
    found = rmia_scores(run, reference=ref)
    assert list(found) == [f'{a:g}' for a in OFFLINE_A]
    assert [len(x) for x in found['0.2']] == [30, 30]
    asked = [(run.view_loss(d), ref.view_loss(d)) for d in ('forget', 'test')]
    population = run.loss('val')[None], ref.loss('val')[None]   # all OUT for both
    assert found == rmia_scales(asked, population)
    assert found == rmia_against(run, [ref]) == rmia_against(run, [ref, ref])
    assert found != rmia_against(run, [ref, other])


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
