"""The ledger of claims: one rule for every verdict, and lines that the tables give."""
import numpy as np
import pandas as pd
import pytest

from oneshui.claims import (
    Claim,
    Results,
    cells_for,
    ledger,
    over_cells,
    published_difference,
    verdict_on,
)
from oneshui.presets import published_folder


@pytest.mark.parametrize('found, sense, said', [
    ((5, 1, 9, 3), 'more', 'held'),
    ((-5, -9, -1, 3), 'more', 'did not hold'),
    ((.4, .1, .7, 3), 'more', 'did not hold'),      # true, and as good as nothing
    ((.4, -1, 1.8, 3), 'more', 'did not hold'),
    ((3, -1, 7, 5), 'more', 'undecided at n = 5'),
    ((0, -1.9, 1.9, 3), 'no worse', 'held'),
    ((5, -1.9, 12, 3), 'no worse', 'held'),          # better is no worse
    ((-5, -8, -2.1, 3), 'no worse', 'did not hold'),
    ((1, -3, 5, 3), 'no worse', 'undecided at n = 3'),
    ((), 'no worse', 'not measured')])
def test_one_rule_for_every_verdict(found, sense, said):
    assert verdict_on(found, sense) == said


def test_requests_of_a_training_count_once():
    names = ['dataset', 'n_forget', 'seed', 'request']
    index = pd.MultiIndex.from_product([['a'], [5], [0, 1, 2], range(4)], names=names)
    values = pd.Series(np.repeat([1., 2, 6], 4), index)
    mean, low, high, n = over_cells(values)
    assert (mean, n) == (3, 3)
    assert high - mean == pytest.approx(4.302653 * np.std([1, 2, 6], ddof=1) / 3 ** .5)
    assert cells_for(values) == '1 of 1' and cells_for(-values) == '0 of 1'


def test_the_best_method_is_picked_cell_by_cell(tmp_path):
    same = dict(n_forget=5, request=0, metric='tow')
    rows = [same | dict(dataset=d, seed=k, method=m, value=v)
            for d, m, vs in (('a', 'x', (1, 9)), ('a', 'y', (4, 4)),
                             ('b', 'x', (1, 1)), ('b', 'y', (2, 3)))
            for k, v in enumerate(vs)]
    pd.DataFrame(rows).to_csv(tmp_path / 'results.csv')
    best = Results(tmp_path).best(['x', 'y'])
    assert best.xs('a').tolist() == [1, 9] and best.xs('b').tolist() == [2, 3]


def test_what_is_not_published_is_not_measured(tmp_path):
    assert published_difference(tmp_path, 'ablation_inputs', 'no features') == ()


def test_parts_of_what_gains_nothing_are_moot():
    part = Claim('a part helps', '8', 'celeba 5', 'ToW', 'more', (3, 1, 5, 3), why='so')
    there, moot = ledger([part, part._replace(moot=True)]).to_dict('records')
    assert (there['verdict'], there['why']) == ('held', 'so')
    assert (moot['verdict'], moot['why']) == ('moot', '')


def test_published_ledger_is_that_of_the_published_tables():
    home = published_folder('mini')
    claims = pd.read_csv(home / 'claims.csv').set_index(['claim', 'where'])
    of, numbers = Results(home), ['mean', 'low', 'high', 'n']
    gap = of('pretrain', 'forget') - of('retrain', 'forget')
    gap = over_cells(gap.drop(['celeba', 'celebahq'], level='dataset'))
    line = claims.loc['A model remembers who was in its training data', 'MUFAC']
    assert line[numbers].tolist() == pytest.approx(gap, rel=1e-3)
    found = published_difference(home, 'ablation_inputs', 'no features')
    line = claims.loc['h_φ needs the features'].iloc[0]
    assert line[numbers].tolist() == pytest.approx(found, rel=1e-3)
    for c in claims[claims.verdict != 'moot'].itertuples():
        found = () if np.isnan(c.mean) else (c.mean, c.low, c.high, c.n)
        assert c.verdict == verdict_on(found, c.sense), c.Index
