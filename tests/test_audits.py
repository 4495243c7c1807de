"""Which models an attacker owns, what they have learned; probes held to both ends."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from oneshui.attacks import auc_of_scales, rmia_against
from oneshui.audits import (
    FIXED, attack_runs, confidences_at, known_to, losses_at,
    offline_scale, oracle_runs, partner, references_of, rmia_independent, strongest,
    trained_anew, two_kinds)
from oneshui.probes import (
    WHO, nearness, outputs_at, people_of, relearning_runs, remembered, three_sample,
    three_sample_runs)
from oneshui.runs import RunStore, first_training, make_runs

ROWS = 'pretrain', 'retrain', 'retrain_again', 'neggrad'


@pytest.fixture(scope='module')
def two(smoke):
    "The smallest preset with two requests of each training."
    return smoke.model_copy(update=dict(requests=2))


@pytest.fixture(scope='module')
def specs(shared, two):
    "Four rows, two trainings, two requests each."
    def run(k, r, m):
        s = shared.spec(two, 'mufac', 2, k, m.removesuffix('_again'), number=r)
        return shared.related(s, m) if m == 'retrain_again' else s
    found = {('mufac', 2, k, r, m): run(k, r, m)
             for k in (0, 1) for r in (0, 1) for m in ROWS}
    make_runs(shared, list(found.values()), 1)
    return found


@pytest.fixture(scope='module')
def attacked(shared, specs): return attack_runs(shared, specs, 1, released=True)


@pytest.fixture(scope='module')
def one(specs):
    "The rows of one request."
    return {key: s for key, s in specs.items() if key[2:4] == (0, 0)}


@pytest.mark.parametrize('row', ROWS)
@pytest.mark.parametrize('kind', ['twin', 'independent'])
def test_no_reference_has_learned_who_is_asked_about(shared, specs, row, kind):
    s = specs['mufac', 2, 0, 0, row]
    asked = shared.request(s)
    for ref in references_of(shared, s, kind):
        r = shared.request(ref)
        assert ref.start == 'retrain' or ref.method == 'retrain'
        assert not np.isin(asked.forget, r.retain).any()
        assert not np.isin(np.concatenate([asked.test, asked.val]), r.train).any()
        if kind == 'twin': assert ref.seeds.training == s.seeds.training
        else: assert ref.seeds.training != s.seeds.training


def test_a_run_is_never_its_own_reference(shared, two):
    s = shared.spec(two, 'mufac', max(two.cell('mufac').n_forget), 0, 'retrain')
    assert references_of(shared, s, 'twin') == trained_anew(s)


def test_trained_anew_is_another_training_of_the_same_request(shared, specs):
    s = specs['mufac', 2, 1, 0, 'neggrad']
    assert [x.seeds.training for x in trained_anew(s, 3)] == [1001, 2001, 3001]
    assert {x.seeds.request for x in trained_anew(s, 3)} == {1}
    assert shared.related(trained_anew(s)[0], 'pretrain').seeds.training == 1001
    again = shared.related(s, 'retrain_again')
    assert again in trained_anew(shared.related(s, 'retrain'), 3)
    assert trained_anew(again) == [shared.related(s, 'retrain')]
    assert first_training(again) == shared.related(s, 'retrain')


def test_who_plays_the_target_has_learned_it(shared, specs, two):
    s = specs['mufac', 2, 0, 1, 'neggrad']
    assert partner(s) == specs['mufac', 2, 0, 0, 'neggrad']
    for kind in ('twin', 'independent'):
        player, = references_of(shared, partner(s), kind)
        assert np.isin(shared.request(s).forget, shared.request(player).retain).all()
        assert 0 <= float(offline_scale(shared, s, kind)) <= 1
    single = two.model_copy(update=dict(requests=1))
    alone = shared.spec(single, 'mufac', 2, 0, 'neggrad')
    assert offline_scale(shared, alone, 'twin') == FIXED


def test_table_of_attacks(shared, specs, attacked):
    t, scores = attacked
    attacks = {'rmia', 'rmia_independent', 'rmia_best', 'rmia_released', 'lira'}
    counts = t.attack.value_counts()   # LiRA's few references may know too little
    assert set(t.attack) == attacks and counts.drop('lira').eq(len(specs)).all()
    assert len(scores) == len(t)
    assert list(t.columns[:5]) == ['dataset', 'n_forget', 'seed', 'request', 'method']
    assert set(t.method) == set(ROWS) and set(t.request) == {0, 1}
    bounds = t[['tpr_low', 'tpr', 'tpr_high', 'auc_low', 'auc', 'auc_high']]
    assert bounds.notna().all(axis=None)
    assert (t.tpr_low <= t.tpr + 1e-9).all() and (t.tpr <= t.tpr_high + 1e-9).all()


def test_settings_are_not_chosen_on_what_is_reported(shared, specs, attacked):
    key = 'mufac', 2, 0, 0, 'pretrain'
    t, scores = attacked
    mine = t[(t.seed == 0) & (t.request == 0) & (t.method == 'pretrain')]
    setting = mine.set_index('attack').setting
    found = shared.metric(specs[key], 'rmia_scores')
    auc = auc_of_scales(found)
    assert auc[setting.rmia_best] == max(auc.values()) >= auc[setting.rmia]
    assert setting.rmia == offline_scale(shared, specs[key], 'twin')
    assert scores[key, 'rmia'][0].tolist() == found[setting.rmia][0]
    theirs = {'1,0.2': ([3., 1], [2., 0]), '2,0.2': ([3., 3], [2., 0])}
    assert strongest(theirs, 'tpr')[0] == '2,0.2'


def test_independent_rmia_averages_k_references(shared, specs):
    s = specs['mufac', 2, 0, 0, 'neggrad']
    refs = references_of(shared, s, 'independent', 2)
    seen = [shared.outputs(x, 8) for x in (s, *refs)]
    assert rmia_independent(shared, s, 2) == rmia_against(seen[0], seen[1:])
    assert rmia_independent(shared, s) == rmia_against(*[seen[0], seen[1:2]])


def test_lira_asks_other_trainings_only(shared, specs):
    s = specs['mufac', 2, 0, 0, 'neggrad']
    φ, member = known_to(shared, s)
    r = shared.request(s)
    assert member[r.retain].all() and not member[r.test].any()
    assert np.isnan(φ[r.forget]).all(), 'what it forgot it is not asked'
    alone = {k: x for k, x in specs.items() if k[2] == 0 and k[-1] == 'neggrad'}
    t, _ = attack_runs(shared, alone, 1)
    assert 'lira' not in set(t.attack), 'the other request of a seed is no reference'


def test_oracles_and_what_forgot(shared, one):
    s = one['mufac', 2, 0, 0, 'neggrad']
    forgot, never = two_kinds(shared, s, 3)
    assert [x.seeds.training for x in forgot] == [x.seeds.training for x in never]
    assert {x.method for x in never} == {'retrain'}
    assert {x.number for x in forgot} == {0}
    others, same = two_kinds(shared, one['mufac', 2, 0, 0, 'retrain'], 3)
    assert same == never and not {x.digest for x in others} & {x.digest for x in same}
    few = {k: x for k, x in one.items() if k[-1] in ('retrain', 'neggrad')}
    t = oracle_runs(shared, few, models=2, n_jobs=1)
    assert t.method.tolist() == ['retrain', 'neggrad'] and (t.models == 2).all()
    assert t[['auc', 'epsilon', 'quality', 'klom', 'klom_95']].notna().all(axis=None)
    φ = confidences_at(shared, never, shared.request(s).forget)
    assert φ.shape == (3, len(shared.request(s).forget))


# Probes

def test_relearning_begins_where_the_run_ended(shared, one):
    t = relearning_runs(shared, one, (0, 2, 4), 1)
    assert len(t) == 3 * len(one) and list(t.steps[:3]) == [0, 2, 4]
    for key, s in one.items():
        mine = t[t.method == key[-1]].set_index('steps')
        assert mine.forget[0] == pytest.approx(shared.metrics(s)['forget'])
        assert mine.forget_loss[0] == pytest.approx(
            losses_at(shared, s, shared.request(s).forget).mean(), abs=1e-5)
        assert mine.forget_loss[4] != mine.forget_loss[0], 'it was trained on'


def test_relearning_looks_at_the_same_steps_however_often(shared, one):
    few = {k: x for k, x in one.items() if k[-1] == 'retrain'}
    last = [relearning_runs(shared, few, steps, 1).forget_loss.iloc[-1]
            for steps in ((0, 3), (0, 1, 3))]
    assert last[0] == pytest.approx(last[1], rel=1e-5)


def test_the_three_samples_are_of_another_training(shared, one):
    s = one['mufac', 2, 0, 0, 'retrain']
    ends = [trained_anew(shared.related(s, w))[0] for w in ('pretrain', 'retrain')]
    make_runs(shared, ends, 1)
    rows = shared.request(s).forget
    assert ends[1] == one['mufac', 2, 0, 0, 'retrain_again']
    z, *others = (outputs_at(shared, x, rows) for x in (s, *ends))
    d = [np.linalg.norm(z - other, axis=1) for other in others]
    by_hand = (d[0] - d[1]) / (d[0] + d[1])
    assert nearness(shared, s)['nearness'] == pytest.approx(by_hand)
    assert np.exp(outputs_at(shared, s, rows)).sum(1) == pytest.approx(1), 'classes'
    t = three_sample_runs(shared, one, 1)
    assert t.nearness.between(-1, 1).all() and (t.low <= t.high).all()


def test_three_samples_at_both_ends():
    who = np.repeat(np.arange(10), 4)
    of = lambda x: three_sample(pd.DataFrame(dict(person=who, nearness=x)))
    rng = np.random.default_rng(0)
    known, gone, even = (of(rng.normal(μ, .1, 40)) for μ in (-.5, .5, 0.))
    assert known['high'] < 0 < gone['low'] and even['low'] < 0 < even['high']
    assert (known['nearer'], gone['nearer'], gone['people']) == (0, 100, 10)


def test_people_are_counted_against_a_second_retrain(shared, one):
    t = remembered(people_of(shared, one, 1))
    s = one['mufac', 2, 0, 0, 'neggrad']
    asked = shared.request(s).forget_identities
    assert len(t) == len(asked) * len(one) and set(t.person) == set(asked)
    assert (t[t.method == 'retrain'].gap == 0).all()
    again = t[t.method == 'retrain_again']
    assert (again.loss == again.retrain_again).all()
    assert t.images.groupby(t.method).sum().eq(len(shared.request(s).forget)).all()


def test_a_second_retrain_is_beyond_the_bar_for_one_in_twenty():
    n, rng = 2000, np.random.default_rng(0)
    toy = pd.DataFrame(dict.fromkeys(WHO, 0), index=range(n)).assign(
        person=np.arange(n), retrain=rng.normal(1, .1, n),
        retrain_again=rng.normal(1, .1, n))
    told = remembered(toy.assign(loss=toy.retrain_again))
    assert (told.remembered | told.conspicuous).mean() == pytest.approx(.05, abs=.001)
    known, hurt = (remembered(toy.assign(loss=x)) for x in (0., 5.))
    assert known.remembered.all() and hurt.conspicuous.all()


# A world with a known answer: a model knows what it was trained on, and nothing else

def logits_of(store, s):
    "An image is hard in its own way; a training adds noise, and 5 to what it learned."
    s, faces = store.served_by(s), store.faces(s.dataset)
    r, y = store.request(s), faces.targets
    noise = np.random.default_rng(int(s.digest, 16)).normal(0, .5, (len(y), 8))
    z = np.random.default_rng(0).normal(0, 1, (len(y), 8)) + noise
    learned = r.train if s.method == 'pretrain' else r.retain
    z[learned, y[learned]] += 5
    return torch.from_numpy(z.astype(np.float32))


@pytest.fixture
def world(monkeypatch, tmp_path, data_dir):
    "A store whose runs are such models."
    def views(self, s, n, r):
        z = logits_of(self, s)
        return {d: z[getattr(r, d)].expand(n, -1, -1) for d in ('forget', 'test')}
    get = lambda self, s: SimpleNamespace(logits=lambda: logits_of(self, s))
    for name, fake in dict(get=get, views=views, has=lambda self, s: True).items():
        monkeypatch.setattr(RunStore, name, fake)
    return RunStore(tmp_path, data_dir)


@pytest.fixture
def known(world, two):
    "Pretrain and Retrain on two requests of three trainings."
    return {('mufac', 3, k, r, m): world.spec(two, 'mufac', 3, k, m, number=r)
            for k in (0, 1, 2) for r in (0, 1) for m in ('pretrain', 'retrain')}


def test_attacks_catch_pretrain_and_pass_retrain(world, known):
    t, _ = attack_runs(world, known, 1)
    auc = t.groupby(['method', 'attack']).auc.mean()
    assert (auc.pretrain > 85).all(), auc
    honest = auc.retrain.drop('rmia_best')
    assert honest.between(35, 65).all(), auc
    assert auc.retrain.rmia_best > auc.retrain.rmia, 'the best of eleven'


def test_oracles_catch_pretrain_and_pass_retrain(world, known):
    t = oracle_runs(world, known, 4, 1).groupby('method').mean(numeric_only=True)
    assert t.auc.pretrain > 95 and abs(t.auc.retrain - 50) < 10
    assert t.tpr.pretrain > 80 > 40 > t.tpr.retrain
    assert t.epsilon.pretrain > t.epsilon.retrain + 5
    assert t.quality.pretrain < t.quality.retrain and t.klom.pretrain > t.klom.retrain


def test_probes_catch_pretrain_and_pass_retrain(world, known):
    near = three_sample_runs(world, known, 1).groupby('method')
    assert (near.high.max().pretrain < 0) and (near.low.min().retrain > 0)
    assert near.nearer.mean().to_dict() == dict(pretrain=0, retrain=100)
    told = remembered(people_of(world, known, 1)).groupby('method')
    assert told.remembered.mean().pretrain > .9 and told.remembered.sum().retrain == 0
