"""How arms are compared, what runs are asked, fresh results beside published ones."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

from oneshui.core import StoreError
from oneshui.experiments import Asked, Experiment, cells_of, grid, requests_of, variants
from oneshui.intervals import compare_arms, t_interval
from oneshui.methods import METHODS, method, one_shot
from oneshui.questions import PORTRAITS, in_turn
from oneshui.questions import portrait_choices, portrait_similarity
from oneshui.questions import prepared_otherwise
from oneshui.questions import progress_by_bin, single_hyper, split_request, thinned
from oneshui.questions import with_portrait
from oneshui.results import dots, in_order, mean_pm, published, tabular, title_of
from oneshui.results import write_table
from oneshui.runs import make_runs, measure
from oneshui.tables import agrees, away_from_retrain, caption_of, compare_with_published
from oneshui.tables import highest, is_published, means_beside, replicates_of
from oneshui.tables import report_published, score_caption, score_numbers, score_table
from oneshui.tables import share_words, table_of
from oneshui.tuning import edges_of, search_cost, tuned_table

matplotlib.use('agg')

SEEDS = {0: 50., 1: 70., 2: 90.}   # what each seed is worth to every arm
GAINS = {'base': (0, 0, 0), 'other': (1, 1, 1), 'noisy': (1, -1, 0), 'near': (2, 3, 4)}


@pytest.fixture
def scores():
    return pd.DataFrame([
        dict(label=a, method='neggrad', dataset='d', n_forget=n, seed=k, retain=1.,
             forget=2., test=3., tow=tow + gain[k])
        for a, gain in GAINS.items() for n in (5, 10) for k, tow in SEEDS.items()])


def test_plus_minus():
    assert mean_pm([1, 2, 3]) == '2.0 ± 2.5' and mean_pm([7]) == '7.0'
    assert mean_pm([10, 55, 99], widest=100) == '54.7 (too few seeds)'


# Compared seed by seed

def test_differences_are_paired(scores):
    n = compare_arms(scores, 'base').set_index(['n_forget', 'label'])
    assert len(n) == 8
    assert tuple(n.loc[(5, 'near'), ['difference', 'n']]) == (3, 3)
    assert n.difference_half[5, 'near'] == pytest.approx(t_interval([2, 3, 4])[1])
    assert n.tow_half[5, 'base'] > 40, 'the arms themselves scatter with the seeds'
    # the middle one of three p-values counts twice, and 3 ± 2.5 excludes 0 only alone
    assert n.verdict[10].to_dict() == {
        'base': '', 'other': 'excludes 0, within ± 2',
        'noisy': 'undecided (sees ≥ 3.6)', 'near': 'undecided (sees ≥ 3.6)'}
    near = scores[scores.label.isin(['base', 'near'])]
    assert compare_arms(near, 'base').verdict[1] == 'excludes 0'


def test_only_seeds_that_both_have_count(scores):
    lacking = scores[~((scores.label == 'base') & (scores.seed == 2))]
    n = compare_arms(lacking, 'base').set_index(['n_forget', 'label'])
    assert n.difference[5, 'near'] == 2.5
    assert n.n[5, 'near'] == 2 and n.replicates[5, 'near'] == 3 and n.n[5, 'base'] == 2
    assert n.verdict[5, 'noisy'].startswith('undecided')
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
    assert ' '.join(table) == 'variant D_r D_f D_te ToW Δ ToW verdict'
    for part in ('set d', '$N_S$ = 5', '3 trainings × one request', 'half of', '*base*',
                 'all 3 comparisons of a cell together (Holm)'):
        assert part in caption
    one = Experiment.of(scores[scores.seed == 0], 'base')
    assert 'One training says nothing about others' in one.caption()
    assert '±' not in one.table().to_string() + one.caption(), 'words, no NaN'
    assert 'nan' not in one.table().to_string().lower()
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
    assert requests_of(smoke, cells, [0, 1])[1] == ('mufac', 2, 1, 0)
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


# Tables 1–3, and fresh beside published

@pytest.fixture(scope='module')
def results():
    rows, first = [], one_shot()[0]
    metrics = ('retain', 'forget', 'test', 'mia', 'tow', 'test_loss', 'seconds')
    for k, r in np.ndindex(3, 2):
        for j, m in enumerate(('pretrain', 'retrain', 'retrain_again', *one_shot())):
            value = {'retrain': 100., 'retrain_again': 95., first: 90. + k}
            rows += [dict(dataset='celeba', n_forget=5, seed=k, request=r, method=m,
                          metric=c, value=value.get(m, 50 + k + j / 10 + .01 * r * k))
                     for c in metrics]
    return pd.DataFrame(rows)


def test_tables_hold_means_with_intervals_and_crown_what_is_decided(results):
    first = one_shot()[0]
    t = score_numbers(results, 'celeba').set_index('label')
    assert t.tow[first] == 91 and t.tow_half[first] == pytest.approx(2.484, abs=1e-3)
    assert t.tow_std[first] == pytest.approx(np.std([90, 91, 92] * 2, ddof=1))
    assert list(t.index[:3]) == ['pretrain', 'retrain', 'retrain_again']
    assert highest(results, 'celeba', 5) == first
    shown = score_table(results, 'celeba', 5)
    assert list(shown)[:6] == ['method', 'D_r', 'D_f', 'D_te', 'MIA', 'ToW']
    assert list(shown.ToW[1:4]) == ['100.0 ± 0.0', '95.0 ± 0.0', '**91.0 ± 2.5**']
    assert shown['of the way'][3].startswith('91 % (')
    second = (results.method == one_shot()[1]) & (results.metric == 'tow')
    more = results.value + 30 + 10 * results.seed
    near = results.assign(value=results.value.mask(second, more))
    assert highest(near, 'celeba', 5) is None
    one = results[results.seed == 0]
    assert highest(one, 'celeba', 5) is None
    assert list(score_table(one, 'celeba', 5).ToW[:2]) == ['50.0', '100.0']


def test_arms_that_are_no_methods_have_rows(results):
    arm = results[results.method == 'metastep']
    arm = arm.assign(label='MetaStep, guessed labels')
    both = pd.concat([results.assign(label=results.method), arm])
    rows = score_table(both, 'celeba', 5).iloc[:, 0]
    assert rows.iloc[-1] == 'MetaStep, guessed labels' and rows[2] == 'Retrain again'
    assert title_of('retrain_again') == 'Retrain again'
    assert in_order(['b', 'ssd', 'a', 'retrain_again', 'b', 'pretrain']) == [
        'pretrain', 'retrain_again', 'ssd', 'b', 'a']


def test_captions_say_how_many_and_what_was_corrected(results):
    said = score_caption(results, 'celeba', 5, 41.2)
    many = len(one_shot())
    for part in ('3 trainings × 2 requests', f'all {many} comparisons', '41 images'):
        assert part in said
    assert 'One training' in score_caption(results[results.seed == 0], 'celeba', 5)
    assert replicates_of(3, 12) == '3 trainings × 4 requests'
    assert replicates_of(1, 1) == 'one training × one request'
    assert replicates_of(2, 5) == '2 trainings, 5 requests'
    assert share_words(.341, .1, .55) == '34 % (10 to 55)'
    assert share_words(1, 1, 1) == '100 %' and share_words(np.nan, 0, 1) == ''
    assert share_words(.3, -np.inf, np.inf) == 'no room for sure'
    assert share_words(np.nan, -np.inf, np.inf) == 'no room'
    assert share_words(-.001, np.nan, np.nan) == '0 %'
    tow = results[results.metric == 'tow']
    tow = tow.rename(columns=dict(method='label', value='tow'))
    alone = compare_arms(tow, None, beside=())
    assert 'Δ' not in caption_of(alone, None)
    assert 'Δ ToW' not in table_of(alone, beside=())


def test_choices_on_the_edge_of_their_grid_are_marked(results):
    tried = pd.DataFrame([
        dict(dataset='celeba', method=m, hyper=f'{{"lr": {x}}}', tow=t,
             requests=4, chosen=x == best, edge=x != 2, seconds=30)
        for m, best in (('ssd', 2), ('pgu', 3))
        for x, t in ((1, 70), (2, 72), (3, 74))])
    edge = edges_of(tried)
    assert edge == {('celeba', 'pgu')}
    rows = list(score_table(results, 'celeba', 5, edge).method)
    assert sum('‡' in r for r in rows) == 1 and f'{title_of("pgu")} ‡' in rows
    cost = search_cost(tried).set_index('method')
    assert tuple(cost.loc['SSD']) == (3, 12, 1.5, 0) and cost['on the edge']['PGU'] == 1
    assert list(tuned_table(tried).celeba) == ['lr 2', 'lr 3 ‡']
    nothing = tried[:0]
    assert not edges_of(nothing) and search_cost(nothing).empty


def test_single_requests_are_drawn_by_training(scores):
    more = pd.concat([scores.assign(request=r, tow=scores.tow + r) for r in range(3)])
    one, all_ = (dots(t).axes[0] for t in (scores, more))
    teeth = lambda ax: sum(line.get_marker() == '|' for line in ax.lines)
    assert teeth(one) >= 12 and teeth(all_) >= 12, 'a comb for each training and arm'
    spines = [line for line in all_.lines if line.get_color() == '.8']
    assert len(spines) == 12 and not [x for x in one.lines if x.get_color() == '.8']


def test_distances_to_retrain(results):
    away = away_from_retrain(results[results.request == 0])
    away = away.set_index(['metric', 'method', 'seed']).points.sort_index()
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
    second = (changed.seed == 1) & (changed.request == 1)
    changed.loc[is_('pgu', 'tow') & second, 'value'] += .2
    changed.loc[is_('jit', 'tow'), 'value'] -= .05      # rounding
    changed.loc[is_('ssd', 'mia'), 'value'] += 1.4   # rounding, and a forest
    changed.loc[is_('neggrad', 'mia'), 'value'] += 1.6
    changed.loc[is_('pretrain', 'seconds'), 'value'] += 100
    first = (changed.seed == 2) & (changed.request == 0)
    changed = changed[~(is_('retrain', 'forget') & first)]
    changed.to_csv(fresh, index=False)
    t = compare_with_published(fresh, old)
    beyond = t[~t.within]
    assert set(zip(beyond.method, beyond.metric)) == {
        ('pgu', 'tow'), ('neggrad', 'mia'), ('retrain', 'forget')}
    pgu = beyond[beyond.method == 'pgu'].iloc[0]
    assert pgu.largest == pytest.approx(.2)
    assert pgu['where'] == 'celeba, N_S = 5, seed 1, request 1'
    missing = beyond[beyond.method == 'retrain'].iloc[0]
    assert 'seed 2, request 0: not in the fresh results' in missing['where']
    assert np.isnan(missing.largest)
    swapped = compare_with_published(old, fresh)
    assert swapped['where'].str.contains('not published').sum() == 1


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "A fresh folder and a published one, and how to write results into one."
    import oneshui.tables
    there = tmp_path / 'published'
    there.mkdir()
    monkeypatch.setattr(oneshui.tables, 'published_folder', lambda preset: there)
    write = lambda where, r: r.to_csv(where / 'results.csv', index=False)
    return tmp_path, there, write


def test_a_smaller_run_is_compared_run_by_run(results, folders):
    fresh, there, write = folders
    assert not is_published(fresh) and not agrees(fresh), 'nothing is there'
    write(there, results)
    few = results[(results.seed == 1) & (results.request == 0)]
    write(fresh, few)
    assert agrees(fresh) and not is_published(fresh), 'true, and not all'
    write(fresh, results)
    assert agrees(fresh) and is_published(fresh)
    write(fresh, few.assign(value=few.value + 1))
    assert not agrees(fresh)
    write(fresh, few.assign(seed=7))
    assert not agrees(fresh), 'a run that is not published'
    old = results[results.request == 0].drop(columns='request')
    write(there, old)
    write(fresh, old[old.seed < 2])
    assert agrees(fresh), 'files without the column'
    t = means_beside(fresh / 'results.csv', there / 'results.csv')
    assert list(t)[-2:] == ['fresh: 2 trainings × one request',
                            'published: 3 trainings × one request']
    assert t.iloc[1, -2:].tolist() == ['100.0 ± 0.0'] * 2


def test_report_is_a_small_table(results, folders):
    fresh, there, write = folders
    write(fresh, results)
    assert 'Nothing to compare with' in report_published(fresh, 'mini')
    write(there, results)
    assert 'All within the rounding' in report_published(fresh, 'mini')
    write(there, results.assign(value=results.value + (results.metric == 'tow')))
    said = report_published(fresh, 'mini')
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
