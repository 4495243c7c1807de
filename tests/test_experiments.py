"""How arms are compared, what runs are asked, fresh results beside published ones."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from oneshui.core import StoreError
from oneshui.experiments import Asked, Experiment, cells_of, compare_arms, grid
from oneshui.experiments import table_of, variants
from oneshui.methods import METHODS, method, one_shot
from oneshui.questions import ONE_SEED, PORTRAITS, attack_runs, in_turn
from oneshui.questions import portrait_choices, portrait_similarity, power
from oneshui.questions import prepared_otherwise
from oneshui.questions import progress_by_bin, single_hyper, split_request, thinned
from oneshui.questions import with_portrait
from oneshui.results import away_from_retrain, compare_with_published, dots, highest
from oneshui.results import mean_pm, published, report_published, score_numbers
from oneshui.results import score_table, t_interval, tabular, verdict, write_table
from oneshui.runs import make_runs, measure

matplotlib.use('agg')

SEEDS = {0: 50., 1: 70., 2: 90.}   # what each seed is worth to every arm
GAINS = {'base': (0, 0, 0), 'other': (1, 1, 1), 'noisy': (1, -1, 0), 'near': (2, 3, 4)}


@pytest.fixture
def scores():
    return pd.DataFrame([
        dict(label=a, method='neggrad', dataset='d', n_forget=n, seed=k, retain=1.,
             forget=2., test=3., tow=tow + gain[k])
        for a, gain in GAINS.items() for n in (5, 10) for k, tow in SEEDS.items()])


# Intervals and verdicts

def test_interval_by_hand():
    mean, half, n = t_interval([1, 2, 3])
    assert (mean, n) == (2, 3) and half == pytest.approx(4.302653 / np.sqrt(3))
    assert np.isnan(t_interval([7])[1]) and t_interval([])[2] == 0
    assert mean_pm([1, 2, 3]) == '2.0 ± 2.5' and mean_pm([7]) == '7.0'
    assert mean_pm([10, 55, 99], widest=100) == '54.7 (too few seeds)'


@pytest.mark.parametrize('values, says', [
    ([2, 3, 4], 'excludes 0'), ([-2, -3, -4], 'excludes 0'),
    ([1, 2, 3], 'undecided at n = 3'), ([0, 0], 'no difference'),
    ([5], 'one seed'), ([], '–')])
def test_verdicts(values, says): assert verdict(*t_interval(values)) == says


# Compared seed by seed

def test_differences_are_paired(scores):
    n = compare_arms(scores, 'base').set_index(['n_forget', 'label'])
    assert len(n) == 8
    assert tuple(n.loc[(5, 'near'), ['difference', 'n']]) == (3, 3)
    assert n.difference_half[5, 'near'] == pytest.approx(t_interval([2, 3, 4])[1])
    assert n.tow_half[5, 'base'] > 40, 'the arms themselves scatter with the seeds'
    assert n.verdict[10].to_dict() == {
        'base': '', 'other': 'excludes 0', 'noisy': 'undecided at n = 3',
        'near': 'excludes 0'}, '3 ± 2.5'


def test_only_seeds_that_both_have_count(scores):
    lacking = scores[~((scores.label == 'base') & (scores.seed == 2))]
    n = compare_arms(lacking, 'base').set_index(['n_forget', 'label'])
    assert n.difference[5, 'near'] == 2.5
    assert n.n[5, 'near'] == 3 and n.n[5, 'base'] == 2
    assert n.verdict[5, 'noisy'] == 'undecided at n = 2'
    alone = compare_arms(scores[scores.label != 'base'], 'base')
    assert set(alone.verdict) == {'–'} and alone.difference.isna().all()


def test_compared_method_by_method(scores):
    two = pd.concat([scores, scores.assign(method='pgu', tow=scores.tow - 10)])
    within = ('method', 'dataset', 'n_forget')
    n = Experiment.of(two, 'base', within).compare().set_index(list(within) + ['label'])
    assert len(n) == 16 and n.difference['pgu', 'd', 5, 'other'] == 1


def test_table_and_caption_say_everything_once(scores):
    e = Experiment.of(scores[scores.n_forget == 5], 'base')
    table, caption = e.table(), e.caption()
    assert ' '.join(table) == 'variant D_r D_f D_te ToW Δ ToW 95 % interval'
    for part in ('set d', '$N_S$ = 5', '3 seeds', 'half of', '*base*', 'paired'):
        assert part in caption
    both = Experiment.of(scores, 'base').table()
    assert list(both)[:2] == ['N_S', 'variant'] and 'NegGrad' not in both.to_string()
    names = dict(zip(GAINS, ('pretrain', 'neggrad', 'ssd', 'pgu')))
    methods = scores.replace(dict(label=names))
    shown = Experiment.of(methods, 'pretrain').table()
    assert list(shown.method[:2]) == ['Pretrain', 'NegGrad']
    fine = table_of(e.compare(), digits=dict(retain=3))
    assert fine.D_r[0] == '1.000 ± 0.000' and fine.D_f[0] == '2.0 ± 0.0'


def test_formats():
    rows = pd.DataFrame({'a_b': ['**1.0 ± 2.0**'], 'D_te': ['SCRUB †'],
                         'Δ': ['5 % & N_S']})
    tex = tabular(rows, 'tex')
    for part in (r'a\_b', r'$\mathcal D_{te}$', r'\textbf{1.0 $\pm$ 2.0}',
                 r'$^\dagger$', r'5 \% \& $N_S$', r'\toprule'):
        assert part in tex
    assert '| **1.0 ± 2.0** | SCRUB † ' in tabular(rows)


def test_saved_in_five_formats_and_drawn_from_a_summary(scores, tmp_path):
    e = Experiment.of(scores, 'base')
    e.save(tmp_path, 'x', e.plot())
    again = pd.read_csv(tmp_path / 'x.csv')
    formats = {f.suffix for f in tmp_path.iterdir()}
    assert formats == {'.csv', '.md', '.tex', '.png', '.svg'}
    assert len(again) == 8 and again.difference[1] == 1
    first = (tmp_path / 'x.svg').read_bytes()
    e.save(tmp_path, 'x', e.plot())
    assert (tmp_path / 'x.svg').read_bytes() == first, 'the same picture, the same file'
    axes = dots(again, 'difference', reference={('d', 5): 0}).axes
    assert len(axes[0].lines) == len(axes[1].lines) + 1, 'the dotted line'
    assert [t.get_text() for t in axes[0].get_yticklabels()] == list(GAINS)


# Arms

def test_arms_take_the_presets_settings(shared, smoke):
    cells = cells_of(smoke, ['mufac', 'celeba'], smallest=True)
    assert cells == [('mufac', 2), ('celeba', 2)]
    arms = grid(shared, smoke, cells, [0, 1], ['pretrain', 'pgu'])
    assert [len(a) for a in arms.values()] == [4, 4]
    assert arms['pgu'][0] == shared.spec(smoke, 'mufac', 2, 0, 'pgu')
    steps = variants(shared, smoke, cells, [0], {'1': {}, '2': dict(steps=2)})
    assert steps['2'][1].hyper == steps['1'][1].hyper | dict(steps=2)


def test_runs_and_questions_are_scores_alike(shared, smoke):
    s = shared.spec(smoke, 'mufac', 2, 0, 'neggrad', dict(lr=2.))
    arms = {'at once': [s], 'in turn': [Asked(s, in_turn, parts=[[0], [1]])],
            'the same': [Asked(s, in_turn, parts=[[0, 1]])]}
    e = Experiment(shared, arms, 'at once', n_jobs=1)
    n = e.run().compare().set_index('label')
    assert n.difference['the same'] == pytest.approx(0, abs=1e-3)
    assert n.tow['at once'] == shared.metrics(s)['tow']
    pretrain = shared.metrics(shared.related(s, 'pretrain'))['tow']
    assert e.pretrain() == {('mufac', 2): pretrain}


def test_a_diverging_preparation_stops_only_what_needs_it(shared, smoke):
    def prepare(model, train, val): raise FloatingPointError('A is nan')
    @method('Diverging', prepare=prepare)
    def diverging(model, support, state): raise AssertionError('must not be reached')
    try:
        bad, good = (shared.spec(smoke, 'mufac', 2, 0, 'diverging', {}),
                     shared.spec(smoke, 'mufac', 2, 0, 'neggrad'))
        says = '(?s)^1 of .*diverging-prepared.*A is nan'
        with pytest.raises(StoreError, match=says):
            Experiment(shared, dict(bad=[bad], good=[good]), n_jobs=1).run()
        assert shared.has(good) and not shared.has(bad)
    finally: del METHODS['diverging']


# Questions

def test_another_portrait_is_judged_on_the_same_images(shared, smoke):
    s = shared.spec(smoke, 'celeba', 2, 0, 'neggrad', dict(lr=2.))
    make_runs(shared, [s], 1)
    found = {c: with_portrait(shared, s, c) for c in PORTRAITS}
    assert len({q['images'] for q in found.values()}) == 1
    assert len({q['tow'] for q in found.values()}) > 1
    who = shared.faces('celeba').identity
    people = {tuple(who[rows]) for rows in portrait_choices(shared, s).values()}
    assert len(people) == 1, 'the same people in the same order, whatever they hand in'


def test_similarity_is_asked_once_and_a_torn_answer_is_named(shared, smoke):
    s = shared.spec(smoke, 'mufac', 2, 0, 'pretrain')
    make_runs(shared, [s], 1)
    ask = lambda: measure(shared, portrait_similarity, [(s, {})], n_jobs=1)[0]
    before = set((shared.root / 'results').glob('*.json'))
    first = ask()
    new, = set((shared.root / 'results').glob('*.json')) - before
    assert ask() == first and len(first) == len(shared.request(s).forget)
    assert all(-1 <= c <= 1 for c in first)
    new.write_text('{"torn')
    with pytest.raises(StoreError, match='Delete it'): ask()
    new.unlink()


def test_preparing_on_the_same_data_gives_the_run(shared, smoke):
    s = shared.spec(smoke, 'celeba', 2, 0, 'metastep')
    make_runs(shared, [s], 1)
    train = shared.sets(s)['train']
    same = prepared_otherwise(shared, s, train, s.hyper)
    assert same['tow'] == pytest.approx(shared.metrics(s)['tow'], abs=1e-3)
    few = thinned(train, .5, np.random.default_rng(0))
    counts, all_ = (pd.Series(x.identity).value_counts() for x in (few, train))
    assert (counts < all_.reindex(counts.index)).sum() == len(all_) // 2
    assert set(counts.index) == set(all_.index) and set(counts) >= {1}


def test_settings_of_one_person(smoke):
    assert single_hyper(smoke, 'mufac', 'neggrad') == smoke.hyper('mufac', 'neggrad', 2)
    assert single_hyper(smoke, 'mufac', 'metaunlearn')['simulated_size'] == 2
    assert split_request(5, 2) == [[0, 1, 2], [3, 4]]


def test_progress_is_zero_for_pretrain_and_one_for_retrain():
    rng = np.random.default_rng(0)
    d = pd.DataFrame(dict(dataset='d', n_forget=1, seed=0, person=np.arange(200) // 4,
                          images=4, cosine=rng.random(200), pretrain=rng.random(200),
                          retrain=2 + rng.random(200)))
    for column, value in (('pretrain', 0), ('retrain', 1)):
        b = progress_by_bin(d.assign(method='m', loss=d[column]))
        inside = b[b.bin != 'last − first']
        assert np.allclose(inside[['progress', 'low', 'high']], value)
        assert inside.n.sum() == 200
        assert np.allclose(b[b.bin == 'last − first'].progress, 0)
    d = d.assign(method='m', loss=(d.pretrain + d.retrain) / 2)
    half = progress_by_bin(d, bins=2)
    assert np.allclose(half.progress[:2], .5) and half.people[0] <= 50


def test_attacks_do_not_choose_on_what_they_report(shared, smoke):
    specs = {('mufac', 3, k, m): shared.spec(smoke, 'mufac', 3, k, m)
             for k in (0, 1) for m in ('pretrain', 'retrain')}
    make_runs(shared, list(specs.values()), 1)
    t, scores = attack_runs(shared, specs, 1, released=True)
    attacks = {'rmia', 'rmia_best', 'rmia_released', 'lira'}
    assert set(t.attack) == attacks and len(t) == 16
    assert set(scores) == {(key, a) for key in specs for a in attacks}
    setting = t.set_index(['seed', 'method', 'attack']).setting
    other = power(shared.metric(specs['mufac', 3, 1, 'pretrain'], 'rmia_scores'))
    assert other[setting[0, 'pretrain', 'rmia']] == other.max(), "seed 1's best"
    own = power(shared.metric(specs['mufac', 3, 0, 'pretrain'], 'rmia_scores'))
    assert own[setting[0, 'pretrain', 'rmia_best']] == own.max()
    one, _ = attack_runs(shared, {k: s for k, s in specs.items() if k[2] == 0}, 1)
    assert set(one[one.attack == 'rmia'].setting) == {ONE_SEED}
    assert 'lira' not in set(one.attack)


# Tables 1–3, and fresh beside published

@pytest.fixture(scope='module')
def results():
    rows, first = [], one_shot()[0]
    metrics = ('retain', 'forget', 'test', 'mia', 'tow', 'test_loss', 'seconds')
    for k in range(3):
        for j, m in enumerate(('pretrain', 'retrain', *one_shot())):
            value = {'retrain': 100., first: 90. + k}.get(m, 50 + k + j / 10)
            rows += [dict(dataset='celeba', n_forget=5, seed=k, method=m, metric=c,
                          value=value) for c in metrics]
    return pd.DataFrame(rows)


def test_tables_hold_mean_and_deviation_and_crown_what_is_decided(results):
    t, first = score_numbers(results, 'celeba'), one_shot()[0]
    assert t.tow_5_mean[first] == 91 and t.tow_5_std[first] == 1
    assert list(t.index[:2]) == ['pretrain', 'retrain'] and t.shape[1] == 10
    assert highest(results, 'celeba', 5) == first
    shown = score_table(results, 'celeba', 5)
    assert list(shown.ToW[:3]) == ['51.0 ± 1.0', '100.0 ± 0.0', '**91.0 ± 1.0**']
    second = (results.method == one_shot()[1]) & (results.metric == 'tow')
    more = results.value + 30 + 10 * results.seed
    near = results.assign(value=results.value.mask(second, more))
    assert highest(near, 'celeba', 5) is None
    one = results[results.seed == 0]
    assert highest(one, 'celeba', 5) is None
    assert list(score_table(one, 'celeba', 5).ToW[:2]) == ['50.0', '100.0']


def test_distances_to_retrain(results):
    away = away_from_retrain(results).set_index(['metric', 'method', 'seed']).points
    assert (away['forget', 'retrain'] == 0).all()
    assert away['forget', 'pretrain', 2] == 52 - 100


def test_comparison_names_what_changed_and_what_is_missing(results, tmp_path):
    fresh, old = tmp_path / 'fresh.csv', tmp_path / 'old.csv'
    results.to_csv(old, index=False)
    results.to_csv(fresh, index=False)
    same = compare_with_published(fresh, old)
    assert same.within.all() and (same.largest == 0).all()
    assert 'seconds' not in set(same.metric)
    changed = results.copy()
    is_ = lambda m, c: (changed.method == m) & (changed.metric == c)
    changed.loc[is_('pgu', 'tow') & (changed.seed == 1), 'value'] += .2
    changed.loc[is_('jit', 'tow'), 'value'] -= .05      # rounding
    changed.loc[is_('ssd', 'mia'), 'value'] += 1.4   # rounding, and a forest
    changed.loc[is_('neggrad', 'mia'), 'value'] += 1.6
    changed.loc[is_('pretrain', 'seconds'), 'value'] += 100
    changed = changed[~(is_('retrain', 'forget') & (changed.seed == 2))]
    changed.to_csv(fresh, index=False)
    t = compare_with_published(fresh, old)
    beyond = t[~t.within]
    assert set(zip(beyond.method, beyond.metric)) == {
        ('pgu', 'tow'), ('neggrad', 'mia'), ('retrain', 'forget')}
    pgu = beyond[beyond.method == 'pgu'].iloc[0]
    assert pgu.largest == pytest.approx(.2)
    assert pgu['where'] == 'celeba, N_S = 5, seed 1'
    missing = beyond[beyond.method == 'retrain'].iloc[0]
    assert 'seed 2: not in the fresh results' in missing['where']
    assert np.isnan(missing.largest)
    swapped = compare_with_published(old, fresh)
    assert swapped['where'].str.contains('not published').sum() == 1


def test_report_is_a_small_table(results, tmp_path, monkeypatch):
    import oneshui.results
    folder = tmp_path / 'published'
    folder.mkdir()
    monkeypatch.setattr(oneshui.results, 'published_folder', lambda preset: folder)
    write = lambda where, r: r.to_csv(where / 'results.csv', index=False)
    write(tmp_path, results)
    assert 'Nothing is published' in report_published(tmp_path, 'mini')
    write(folder, results)
    assert 'All within the rounding' in report_published(tmp_path, 'mini')
    write(folder, results.assign(value=results.value + (results.metric == 'tow')))
    said = report_published(tmp_path, 'mini')
    assert f'{results.method.nunique()} beyond rounding' in said and 'seed 0' in said
    assert len(said.splitlines()) < 30


def test_published_results_are_shown_as_what_they_are():
    assert set(published('results.csv')) >= {'dataset', 'method', 'metric', 'value'}
    assert published('tow.png').format == 'png'
    assert 'not published' in published('nothing.png').data


def test_written_table_keeps_numbers_and_words_apart(tmp_path):
    numbers, words = (pd.DataFrame(dict(x=[v])) for v in (1.23456789, '1.2'))
    write_table(numbers, tmp_path, 't', words)
    assert (tmp_path / 't.csv').read_text() == 'x\n1.2346\n'
    assert '1.2 |' in (tmp_path / 't.md').read_text()
