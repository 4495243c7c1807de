"""The widgets without a browser: a control that moves changes the sentence and the
picture; trouble is said, not raised."""
import ipywidgets as widgets
import numpy as np
import pytest
from matplotlib.figure import Figure

from oneshui.core import DataError
from oneshui.data import make_request
from oneshui.explore import (Explorer, Walk, explore_portrait, explore_request,
                             explore_roc, explore_step, specs_of_request)
from oneshui.metrics import tug_of_war
from oneshui.vit import ImageSet, predict


@pytest.fixture(scope='module')
def store(shared): return shared


def test_a_moved_control_draws_once_and_a_set_of_them_too():
    drawn = []
    def draw(a, b):
        drawn.append((a, b))
        return Figure(), f'a is {a} and b is {b}'
    e = Explorer(dict(a=widgets.IntSlider(1), b=widgets.IntSlider(2)), draw)
    e.controls['a'].value = 3
    e.set(a=5, b=6)
    assert drawn == [(1, 2), (3, 2), (5, 6)]
    assert e.sentence == 'a is 5 and b is 6'
    assert f'alt="{e.sentence}"' in e.picture.value


def test_trouble_becomes_the_sentence_and_the_picture_stays():
    def draw(a):
        if a > 1: raise DataError('only <one> person is left')
        return Figure(), 'fine'
    e = Explorer(dict(a=widgets.IntSlider(1)), draw)
    before = e.picture.value
    e.set(a=2)
    assert e.said.value == 'only &lt;one&gt; person is left'
    assert e.picture.value == before


def test_a_page_without_a_kernel_gets_the_picture_and_the_sentence():
    e = Explorer(dict(a=widgets.IntSlider(1)), lambda a: (Figure(), 'said'))
    data = e._repr_mimebundle_()
    assert data['image/png'] and data['text/plain'] == 'said'
    assert 'application/vnd.jupyter.widget-view+json' in data


def test_the_request_follows_the_data_set(store, smoke):
    e = explore_request(store, smoke)
    first = e.sentence
    e.controls['dataset'].value = 'mufac'
    n = e.controls['n_forget']
    assert tuple(n.options) == tuple(smoke.cell('mufac').n_forget)
    n.value = max(n.options)
    r = make_request(store.faces('mufac'), n.value, 0, tuple(n.options))
    assert e.sentence != first
    assert f'{n.value} people hand in {n.value} portraits' in e.sentence
    assert f'{len(r.forget):,} other images' in e.sentence


def test_the_step_scales_the_move_and_says_the_scores(store, smoke):
    e = explore_step(store, smoke)
    w = Walk(store, smoke, specs_of_request(store, smoke))
    e.set(method='neggrad', c=0.)
    start = w.at('pretrain', 0.)
    tow = tug_of_war(start, w.gold)
    assert f'ToW {tow:.1f} (Pretrain {start["tow"]:.1f})' in e.sentence
    e.set(c=4.)
    assert f'η = {4 * w.specs["neggrad"].hyper["lr"]:.3g}' in e.sentence
    assert f'ToW {w.at("neggrad", 4.)["tow"]:.1f}' in e.sentence
    head = lambda c: w.model('neggrad', c).state_dict()['head.weight'].numpy()
    one, four = head(1.) - head(0.), head(4.) - head(0.)
    np.testing.assert_allclose(four, 4 * one, atol=1e-5)


@pytest.mark.parametrize('task', ['celeba', 'mufac'])
def test_what_a_model_says_wrongly(store, smoke, task):
    w = Walk(store, smoke, specs_of_request(store, smoke, task))
    m, f, idx = w.models['pretrain'], w.faces, w.request.test
    said = predict(m, ImageSet(w.pixels, idx)).numpy()
    for i, row, names in zip(idx, said, w.wrong(m, idx)):
        if task == 'mufac':
            best = row.argmax()
            assert names == ([f.classes[best]] if best != f.targets[i] else [])
        else:
            wrong = (row > 0) != (f.targets[i] > .5)
            assert names == [c for c, bad in zip(f.classes, wrong) if bad]


def test_roc_switches_and_attacks(store, smoke):
    e = explore_roc(store, smoke, shown=('retrain',))
    assert 'Retrain' in e.sentence and 'Pretrain' not in e.sentence
    e.set(pretrain=True)
    loss = e.sentence
    e.set(attack='RMIA')
    assert 'Pretrain' in loss and e.sentence.startswith('RMIA attack')
    assert e.sentence.split(':')[-1] != loss.split(':')[-1]
    e.set(pretrain=False, retrain=False)
    assert 'no method is switched on' in e.sentence


def test_a_portrait_keeps_its_latents_until_they_are_moved():
    e = explore_portrait(size=48)
    seen = e.sentence
    e.set(glasses=1.)
    assert 'Eyeglasses' in e.sentence.split('The annotator')[0]
    e.controls['photo'].value = 1
    e.controls['photo'].value = 0
    assert e.sentence == seen, 'another photograph and back: its own latents again'
