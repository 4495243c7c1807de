"""Intervals hold their level where requests share a training; verdicts; shares."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from oneshui.intervals import by_training, compare_arms, holm, judged, replicates
from oneshui.intervals import share_of_the_way, simulated, t_interval, verdict

DESIGNS = [(3, 4), (4, 4), (2, 2), (6, 2), (3, 1)]
RATIOS = [0, .1, .5, 1, 2, 10]


def nested(d):
    "Trainings × requests as a Series that knows its trainings."
    names = ['seed', 'request']
    index = pd.MultiIndex.from_product(map(range, d.shape), names=names)
    return pd.Series(d.ravel(), index)


def ends(values):
    mean, half, n = t_interval(values)
    return mean - half, mean + half


# The interval

@pytest.mark.parametrize('trainings, requests', DESIGNS)
@pytest.mark.parametrize('tail', [np.inf, 3])
def test_holds_its_level_whatever_the_ratio(trainings, requests, tail):
    for ratio in RATIOS:
        d = simulated(trainings, requests, ratio, tail, draws=8000, seed=1)
        means = d.mean(2)   # what `t_interval` does, for all draws at once
        half = stats.t.ppf(.975, trainings - 1) * stats.sem(means, axis=1)
        inside = (abs(means.mean(1)) <= half).mean()
        assert inside >= .94, (ratio, inside)
        mean, width, n = t_interval(nested(d[0]))
        assert (mean, n) == (pytest.approx(means[0].mean()), trainings)
        assert width == pytest.approx(half[0])


@pytest.mark.parametrize('ratio, least', [(.5, .87), (2, .75)])
def test_to_count_requests_as_independent_does_not(ratio, least):
    d = simulated(3, 4, ratio, draws=8000).reshape(8000, 12)
    half = stats.t.ppf(.975, 11) * stats.sem(d, axis=1)
    assert (abs(d.mean(1)) <= half).mean() < least


def test_one_training_has_no_interval():
    mean, half, n = t_interval(nested(np.arange(4.).reshape(1, 4)))
    assert (mean, n) == (1.5, 1) and np.isnan(half)
    assert verdict(mean, half, n) == 'one training'


def test_by_hand_and_with_gaps():
    mean, half, n = t_interval([1, 2, 3])
    assert (mean, n) == (2, 3) and half == pytest.approx(4.302653 / np.sqrt(3))
    assert np.isnan(t_interval([7])[1]) and t_interval([])[2] == 0
    d = nested(np.array([[1., 3], [2, 2], [3, np.nan]]))
    assert by_training(d).tolist() == [2, 2, 3], 'a training counts once'
    one_each = nested(np.array([[1.], [2], [3]]))
    assert t_interval(one_each) == t_interval([1, 2, 3])


# Verdicts

@pytest.mark.parametrize('values, says', [
    ([2, 3, 4], 'excludes 0'), ([-2, -3, -4], 'excludes 0'),
    ([1, 2, 3], 'undecided (sees ≥ 2.5)'), ([.1, .2, 0], 'undecided (sees ≥ 0.25)'),
    ([0, 0], 'no difference'), ([5], 'one training'), ([], '–')])
def test_words(values, says): assert verdict(*t_interval(values)) == says


@pytest.mark.parametrize('values, says', [
    ([.1, -.1, .2], 'within ± 2'), ([.1, .2, .15], 'excludes 0, within ± 2'),
    ([5, 5.1, 5.2], 'excludes 0'), ([1, 2, 3], 'undecided (sees ≥ 2.5)'),
    ([0, 0, 0], 'no difference')])
def test_equivalence_is_an_interval_inside_the_margin(values, says):
    mean, half, n = t_interval(values)
    assert verdict(mean, half, n, margin=2) == says
    assert ('within' in says) == (0 < abs(mean) + half < 2)


def test_holm_by_hand():
    assert holm([.01, .04, .03]).tolist() == pytest.approx([.03, .06, .06])
    assert holm([.03, np.nan, .5])[0] == pytest.approx(.06), 'not made, not counted'
    assert np.isnan(holm([np.nan])).all() and len(holm([])) == 0


def test_a_family_is_corrected_as_one():
    rows = [dict(difference=x, difference_half=1., n=4) for x in (1.5, .2, .1, -.3)]
    alone, family = judged(pd.DataFrame(rows[:1])), judged(pd.DataFrame(rows))
    p = 2 * stats.t.sf(1.5 * stats.t.ppf(.975, 3), 3)
    assert alone.p[0] == pytest.approx(p) and family.p[0] == pytest.approx(4 * p)
    assert alone.verdict[0] == 'excludes 0' and family.verdict[0] != 'excludes 0'
    sees = family.sees[0]
    moved = pd.DataFrame([dict(rows[0], difference=sees + .001), *rows[1:]])
    assert judged(moved).verdict[0] == 'excludes 0', 'what it sees, it sees'
    moved.loc[0, 'difference'] = sees - .001
    assert judged(moved).verdict[0].startswith('undecided')


def test_no_effect_is_claimed_once_in_twenty_families():
    arms = np.stack([simulated(4, 4, .5, draws=1500, seed=k).mean(2) for k in range(7)])
    p = stats.ttest_1samp(arms[1:] - arms[0], 0, axis=2).pvalue.T
    corrected = np.array([holm(row) for row in p])
    assert (p < .05).any(1).mean() > .18 and (corrected < .05).any(1).mean() < .065


# The share of the way

@pytest.mark.parametrize('share', [0, .6])
def test_share_holds_its_level(share):
    room = simulated(4, 3, .5, draws=400, seed=2) + 6
    gain = share * room + simulated(4, 3, 1, draws=400, seed=3)
    found = [share_of_the_way(nested(g), nested(r)) for g, r in zip(gain, room)]
    inside = np.mean([low <= share <= high for _, low, high in found])
    assert .92 < inside < .98
    assert np.median([f[0] for f in found]) == pytest.approx(share, abs=.05)


def test_share_is_the_paired_interval_where_the_room_is_known():
    gain = nested(np.array([[2., 2], [3, 3], [4, 4]]))
    share, low, high = share_of_the_way(gain, gain * 0 + 10)
    assert share == pytest.approx(.3)
    assert (low, high) == pytest.approx([x / 10 for x in ends(gain)])


def test_share_without_room_or_without_trainings():
    gain, room = nested(np.array([[1.], [2], [3]])), nested(np.array([[-1.], [1], [2]]))
    assert share_of_the_way(gain, room)[1:] == (-np.inf, np.inf)
    share, low, high = share_of_the_way(gain[:1], room[:1])
    assert share == -1 and np.isnan(low) and np.isnan(high)
    assert np.isnan(share_of_the_way(gain, gain * 0)[0])


# Compared request by request

@pytest.fixture
def scores():
    "Trainings differ by much, requests by little, arms by what their name says."
    gain = dict(pretrain=0, retrain=12, retrain_again=10, ssd=.01, metastep=5, pgu=1)
    rng = np.random.default_rng(0)
    noise = {a: .2 * rng.normal(size=(4, 3)) * (a in ('metastep', 'pgu')) for a in gain}
    return pd.DataFrame([
        dict(label=a, dataset='d', n_forget=5, seed=k, request=r, retain=1., forget=2.,
             test=3., tow=70 + 5 * k + r + g + noise[a][k, r])
        for a, g in gain.items() for k in range(4) for r in range(3)])


def test_requests_are_paired_and_trainings_count(scores):
    n = compare_arms(scores, 'pretrain').set_index('label')
    assert (n.n == 4).all() and (n.replicates == 12).all()
    assert n.tow_half['metastep'] > 9 and n.difference_half['metastep'] < .5
    lacking = scores.drop(scores.query('label == "pretrain" and seed == 3').index)
    n = compare_arms(lacking, 'pretrain').set_index('label')
    assert n.n['metastep'] == 3 and n.n['pretrain'] == 3
    old = scores[scores.request == 0].drop(columns='request')
    assert compare_arms(old, 'pretrain').replicates.eq(4).all(), 'as one request each'


def test_the_yardstick_does_not_compete(scores):
    n = compare_arms(scores, 'pretrain').set_index('label')
    assert (n.compared == 3).all() and n.verdict['pretrain'] == ''
    assert n.verdict['retrain_again'] == n.verdict['metastep'] == 'excludes 0'
    assert n.verdict['ssd'] == 'does nothing' and 'within ± 2' in n.verdict['pgu']
    p = judged(n.loc[['ssd', 'metastep', 'pgu']]).p
    assert n.p['metastep'] == pytest.approx(p['metastep'])
    alone = compare_arms(scores[scores.label != 'pretrain'], 'pretrain')
    assert set(alone.verdict) == {'–'} and alone.difference.isna().all()


def test_a_share_stands_between_pretrain_and_the_ceiling(scores):
    n = compare_arms(scores, 'pretrain').set_index('label')
    assert n.share['metastep'] == pytest.approx(.5, abs=.02)
    assert n.share_low['metastep'] < n.share['metastep'] < n.share_high['metastep']
    assert np.isnan(n.share['retrain']) and n.share['retrain_again'] == 1
    few = compare_arms(scores[scores.label != 'retrain_again'], 'pretrain')
    assert 'share' not in few
    low = scores.assign(tow=scores.tow - 20 * (scores.label == 'retrain_again'))
    n_low = compare_arms(low, 'pretrain').set_index('label')
    assert np.isnan(n_low.share['pgu']) and np.isinf(n_low.share_low['pgu'])
    one = compare_arms(scores[scores.seed == 0], 'pretrain').set_index('label')
    assert np.isnan(one.share_low['pgu']) and one.verdict['pgu'] == 'one training'


def test_what_moves_once_does_something(scores):
    moved = scores.copy()
    moved.loc[(moved.label == 'ssd') & (moved.seed == 2), 'tow'] += .06
    n = compare_arms(moved, 'pretrain').set_index('label')
    assert n.verdict['ssd'] != 'does nothing'
    assert replicates(scores[scores.label == 'ssd'], 'tow').index.is_unique
