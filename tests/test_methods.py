"""Methods: declared in one place, refused by name, blind to what they must not see, and free of faces."""
import copy
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

import oneshui.metastep  # noqa: F401  declares MetaUnlearn and MetaStep
from oneshui.core import DataError, PresetError
from oneshui.data import Pixels, make_request
from oneshui.methods import (
    METHODS, Count, Method, Positive, away, divergence, importance, input_covariance, input_rows, method, method_rows,
    method_title, one_shot, pgu_loss, projected_layers, projection)
from oneshui.presets import for_request
from oneshui.readers import read_faces
from oneshui.vit import ImageSet, create_model, support_set

ROOT = Path(__file__).resolve().parents[1]
BUILT_IN = [k for k, m in METHODS.items() if m.home.startswith('oneshui.')]


class World:
    "A network, image sets and portraits of a request of two."
    def __init__(self, name, data_dir, smoke):
        faces = read_faces(name, data_dir)
        self.name, self.smoke, self.r = name, smoke, make_request(faces, 2, 0)
        pixels = Pixels(faces, smoke.model.image_size, None)
        sets = ('train', 'retain', 'forget', 'val', 'test')
        self.D = {d: ImageSet(pixels, getattr(self.r, d)) for d in sets}
        self.model = create_model(smoke.model, self.D['val'].n_classes, 0)
        self.S = support_set(pixels, self.r.support)

    def settings(self, name): return for_request(name, self.smoke.hyper(self.name, name, 2), 2)

    def unlearned(self, name):
        m, hp = METHODS[name], self.settings(name)
        torch.manual_seed(0)
        state = m.prepare(self.model, self.D['train'], self.D['val'], hp)
        full = dict(retain=self.D['retain'], forget=self.D['forget']) if m.access == 'full' else {}
        return m.unlearn(self.model, self.S, state, hp, **full)


@pytest.fixture(scope='module', params=['celeba', 'mufac'])
def world(request, data_dir, smoke): return World(request.param, data_dir, smoke)


@pytest.fixture
def registry():
    "What a test declares is forgotten afterwards."
    before = dict(METHODS)
    yield METHODS
    METHODS.clear(); METHODS.update(before)


# ---- one declaration

OUTSIDE = '''
from typing import Annotated
from pydantic import Field
import torch
from oneshui.core import device_of
from oneshui.methods import method

def shrink_prepare(model, train, val, *, images: Annotated[int, Field(ge=1)] = 64):
    return dict(mean=torch.tensor(float(min(len(train), images))))

@method('Shrink', source='somebody else', colour='C7', prepare=shrink_prepare)
def shrink(model, support, state, *,
    factor: Annotated[float, Field(gt=0, lt=1)],  # what the head's weights keep
    rounds: Annotated[int, Field(ge=1)] = 1,
):
    "The head shrinks."
    with torch.no_grad():
        for _ in range(rounds): model.head.weight.mul_(factor)
    return model.to(device_of(model))
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    "A package of somebody else's, installed: a module and its entry point."
    (tmp_path / 'shrinkage.py').write_text(OUTSIDE)
    info = tmp_path / 'shrinkage-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: shrinkage\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[oneshui.methods]\nshrink = shrinkage\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop('shrinkage', None)


def test_a_method_from_outside_takes_twenty_lines(outside, registry, world):
    assert len(OUTSIDE.strip().splitlines()) <= 20
    import_module('shrinkage')
    m = METHODS['shrink']
    assert (m.home, m.title, m.colour, m.version) == ('shrinkage', 'Shrink', 'C7', 1)
    assert m.required == ['factor'] and list(m.prepare_settings) == ['images']
    rows = method_rows()
    assert rows.index('neggrad') < rows.index('shrink') < rows.index('scrub'), 'one-shot first'
    assert 'shrink' in one_shot() and method_title('shrink') == 'Shrink'
    hp = dict(factor=.5, rounds=2)
    state = m.prepare(world.model, world.D['train'], world.D['val'], hp)
    u = m.unlearn(world.model, world.S, state, hp)
    assert torch.equal(u.head.weight, world.model.head.weight / 4)


def test_a_method_from_outside_is_found_by_its_entry_point(outside):
    ask = 'from oneshui.methods import METHODS, method_rows; print(METHODS["shrink"].home, "shrink" in method_rows())'
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(outside), str(ROOT)]))
    r = subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True, env=env, cwd=outside)
    assert r.stdout.split() == ['shrinkage', 'True'], r.stderr


def test_a_name_is_taken_once(registry):
    def neggrad(model, support, state): return model
    neggrad.__module__ = 'elsewhere'
    with pytest.raises(PresetError, match='"neggrad" is declared in oneshui.methods and again in elsewhere. Rename'):
        method('Mine')(neggrad)


def test_declarations_that_cannot_work_are_refused(registry):
    def prepare(model, train, val, *, k: int = 1): return {}
    def two_values(model, support, state, *, k: int = 2): return model
    with pytest.raises(PresetError, match='k has one default to prepare with'):
        method('Two values', prepare=prepare)(two_values)
    with pytest.raises(PresetError, match='access = "ful". Valid: one-shot, full'): method('Typo', access='ful')
    assert 'two_values' not in METHODS


def test_rows_and_titles():
    assert [k for k in method_rows() if k in (*BUILT_IN, 'pretrain', 'retrain')] == [
        'pretrain', 'retrain', 'neggrad', 'ssd', 'pgu', 'jit', 'metaunlearn', 'metastep', 'scrub', 'bad_teacher']
    titles = [method_title(k) for k in ('pretrain', 'neggrad', 'scrub')]
    assert titles == ['Pretrain', 'NegGrad', 'SCRUB †']


# ---- settings

@pytest.mark.parametrize('name, hp, says', [
    ('neggrad', dict(), ['method neggrad', 'setting lr is missing', 'Valid: lr']),
    ('neggrad', dict(lr=0), ['setting lr = 0', 'greater than 0']),
    ('neggrad', dict(lr=.1, eta=.2), ['unknown setting eta', 'Valid: lr']),
    ('neggrad', dict(lr='much'), ["setting lr = 'much'", 'valid number']),
    ('neggrad', dict(lr=float('nan')), ['setting lr = nan']),
    ('pgu', dict(lr=1, epochs=2, gamma=1.5), ['setting gamma = 1.5', 'less than or equal to 1']),
    ('pgu', dict(lr=1, epochs=2.5, gamma=.5), ['setting epochs = 2.5', 'integer']),
    ('pgu', dict(lr=1, epochs=0, gamma=.5, multilabel='all'), ['setting epochs = 0', "multilabel = 'all'", "'released'"]),
    ('ssd', dict(dampening=1, selection=1, batch_size=0), ['setting batch_size = 0']),
])
def test_a_wrong_setting_is_refused_by_name(name, hp, says):
    with pytest.raises(PresetError) as e: METHODS[name].check(hp)
    for part in says: assert part in str(e.value)


def test_unknown_method_lists_the_valid_ones():
    with pytest.raises(PresetError, match='method "forget_it" is unknown. Valid: neggrad, ssd, pgu'): METHODS['forget_it']


def test_check_leaves_what_differs_from_the_defaults():
    m = METHODS['ssd']
    assert m.check(dict(dampening=1, selection='50', batch_size=128)) == dict(dampening=1., selection=50.)
    assert m.check(dict(dampening=1, selection=50, batch_size=64))['batch_size'] == 64
    assert m.check(m.check(dict(dampening=2, selection=50))) == dict(dampening=2., selection=50.)


def test_each_moment_reads_its_own_settings_and_refuses_unknown_ones(world):
    ssd, D = METHODS['ssd'], world.D
    assert ssd.prepare(world.model, D['train'], D['val'], {})   # λ and α are not needed yet
    for hp in (dict(batchsize=1), dict(batch_size=0)):
        with pytest.raises(PresetError): ssd.prepare(world.model, D['train'], D['val'], hp)
        with pytest.raises(PresetError): ssd.unlearn(world.model, world.S, {}, hp | dict(dampening=1, selection=1))
    assert METHODS['jit'].prepare(world.model, D['train'], D['val'], dict(lr=1, sigma=1)) == {}


def test_bare_and_future_annotations_are_read(registry):
    def bare(model, support, state, *, anything=3, lr: 'Positive' = .1, n: Count = 2): return model
    m = Method('bare', 'Bare', 'one-shot', '', 'C0', 1, None, bare, __name__)
    assert m.check(dict(anything='x', lr=.1, n=2)) == dict(anything='x') and not m.required
    with pytest.raises(PresetError, match='lr = -1'): m.check(dict(lr=-1))


# ---- what a method sees, and what it leaves alone

def test_one_shot_methods_get_the_portraits_and_nothing_else(world, registry):
    seen = []
    @method('Spy')
    def spy(model, support, state, *, lr: Positive = 1.):
        seen.append((support, dict(state), lr)); return model
    METHODS['spy'].unlearn(world.model, world.S, dict(kept=torch.ones(1)), {})
    (S, state, lr), = seen
    assert S is world.S and list(state) == ['kept'] and lr == 1
    assert not hasattr(S, 'pixels') and len(S.x) == 2, 'no way back to the data set'
    for name in one_shot():
        if name == 'spy' or name not in BUILT_IN: continue
        with pytest.raises(DataError, match='must not see retain or forget'):
            METHODS[name].unlearn(world.model, world.S, {}, world.settings(name), world.D['retain'], world.D['forget'])


def test_full_access_needs_both_sets(world):
    for name in ('scrub', 'bad_teacher'):
        for given in ({}, dict(retain=world.D['retain'])):
            with pytest.raises(DataError, match=f'{name} has full access: hand it retain and forget'):
                METHODS[name].unlearn(world.model, world.S, {}, world.settings(name), **given)


@pytest.mark.parametrize('name', BUILT_IN)
def test_the_model_handed_in_is_unchanged(name, world):
    before = copy.deepcopy(world.model.state_dict())
    u = world.unlearned(name)
    assert u is not world.model and not u.training
    assert all(torch.equal(v, before[k]) for k, v in world.model.state_dict().items())
    assert all(p.grad is None for p in world.model.parameters())
    assert all(torch.isfinite(p).all() for p in u.parameters())
    moved = [not torch.equal(p, before[k]) for k, p in u.named_parameters()]
    assert any(moved)


def test_scrub_without_forget_epochs_never_looks_at_those_to_forget(world):
    class Locked:
        def batches(self, *_): raise AssertionError('D_f was read')
    for f in (0, 1):
        ask = lambda: METHODS['scrub'].unlearn(
            world.model, world.S, {}, dict(lr=1e-3, forget_epochs=f, epochs=1), world.D['retain'], Locked())
        if not f: ask(); continue
        with pytest.raises(AssertionError, match='D_f was read'): ask()


# ---- the parts

class Images:
    "Tensors that behave like a set of images."
    def __init__(self, x, y): self.x, self.y = x, y
    def batches(self, size, *_, **__):
        for k in range(0, len(self.y), size): yield self.x[k:k + size], self.y[k:k + size]


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 1, 2, dilation=2), nn.ReLU(),
                         nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


def test_importance_is_the_mean_squared_gradient_of_batches(cnn):
    x, y = torch.randn(6, 3, 16, 16), torch.randint(0, 5, (6,))
    found = importance(cnn, Images(x, y), 4)
    each = []
    for k in (slice(0, 4), slice(4, 6)):
        cnn.zero_grad()
        nn.functional.cross_entropy(cnn(x[k]), y[k]).backward()
        each.append({n: p.grad ** 2 for n, p in cnn.named_parameters()})
    for n, v in found.items(): assert torch.allclose(v, (each[0][n] + each[1][n]) / 2, atol=1e-7)


def test_ssd_is_pretrain_to_the_digit_where_nothing_exceeds_the_threshold(world):
    m, D = METHODS['ssd'], world.D
    state = m.prepare(world.model, D['train'], D['val'], {})
    everything = m.unlearn(world.model, world.S, state, dict(dampening=.5, selection=1e-9))
    nothing = m.unlearn(world.model, world.S, state, dict(dampening=.5, selection=1e30))
    same = [torch.equal(a, b) for a, b in zip(nothing.parameters(), world.model.parameters())]
    assert all(same)
    assert not torch.equal(everything.head.weight, world.model.head.weight)
    assert all((a.abs() <= b.abs()).all() for a, b in zip(everything.parameters(), world.model.parameters()))


def test_input_rows_times_the_weight_are_the_layers_answer(cnn):
    answers = {}
    hooks = [m.register_forward_hook(lambda m, a, out, k=k: answers.update({k: (a[0], out)}))
             for k, m in projected_layers(cnn).items()]
    cnn(torch.randn(2, 3, 16, 16))
    for h in hooks: h.remove()
    assert list(answers) == ['0', '2', '6'], 'a grouped convolution sees parts of a patch'
    for k, (a, out) in answers.items():
        layer = cnn[int(k)]
        rows = input_rows(layer, a) @ layer.weight.flatten(1).T + layer.bias
        assert torch.allclose(rows, out.flatten(2).transpose(1, 2).reshape(rows.shape) if out.ndim == 4 else out, atol=1e-5)


def test_covariance_does_not_depend_on_the_batch_size(cnn):
    images = Images(torch.randn(7, 3, 16, 16), torch.zeros(7))
    a, b = input_covariance(cnn, images, 7), input_covariance(cnn, images, 2)
    assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-3) for k in a)
    assert not any(m._forward_hooks for m in cnn.modules()), 'the hooks are gone'


@pytest.mark.parametrize('gamma, rank', [(0., 1), (.5, 1), (.65, 1), (.7, 2), (.95, 3), (1., 4)])
def test_projection_protects_a_share_of_the_spectrum(gamma, rank):
    U, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    P = projection(U @ torch.diag(torch.tensor([36., 4, 1, 1e-4], dtype=torch.float64)) @ U.T, gamma)   # √: 6, 2, 1, .01
    assert torch.allclose(P, P.T) and torch.allclose(P @ P, P) and round(float(P.trace())) == rank
    assert torch.allclose(P @ U[:, 0], U[:, 0])


def test_a_projected_step_leaves_retained_answers_alone():
    torch.manual_seed(0)
    few, many, g, kernel = (torch.randn(*s).double() for s in ((4, 16), (50, 4), (3, 16), (3, 4, 2, 2)))
    retained = many @ few   # in four of sixteen dimensions
    P = projection(retained.T @ retained, .99999)
    moved = lambda step: (retained @ step.T).abs().max()
    assert moved(away(g, P)) < 1e-4 * moved(g) and away(g, P).norm() > .1 * g.norm()
    assert torch.equal(away(kernel, P).flatten(1), away(kernel.flatten(1), P))


def test_pgu_moves_weights_only_and_less_the_more_it_protects(world):
    m, hp = METHODS['pgu'], dict(lr=.1, epochs=2)
    state = m.prepare(world.model, world.D['train'], world.D['val'], {})
    before = dict(world.model.named_parameters())
    far = []
    for γ in (0., .9, 1.):
        u = m.unlearn(world.model, world.S, state, hp | dict(gamma=γ))
        moved = {k: (p - before[k]).norm().item() for k, p in u.named_parameters()}
        assert all(v == 0 for k, v in moved.items() if k.removesuffix('.weight') not in projected_layers(u))
        far.append(sum(moved.values()))
    assert far[0] > far[1] > 0 and far[2] < 1e-3 * far[0]


def test_pgu_loss_by_hand():
    p = torch.tensor([[.2, .5, .3]])
    ours = pgu_loss(p.log(), torch.tensor([1]))
    assert ours == pytest.approx(-np.log(1 - .5 + .05) + .2 * float((p * p.log()).sum()), abs=1e-5)
    logits, y = torch.zeros(1, 40), torch.zeros(1, 40)
    y[0, [3, 7]] = 1
    assert pgu_loss(logits, y) == pytest.approx(-np.log(.55) - .2 * np.log(2), abs=1e-5)
    logits.requires_grad_()
    touched = [torch.autograd.grad(pgu_loss(logits, y, how), logits)[0][0].nonzero().flatten().tolist()
               for how in ('positive', 'released')]
    assert touched[0] == [3, 7] and {0, 1} <= set(touched[1]), '0/1 targets used as indices'


@pytest.mark.parametrize('task, kind', [('softmax', Categorical), ('sigmoid', Bernoulli)])
def test_divergence_is_torchs(task, kind):
    t, s, T = torch.randn(5, 8), torch.randn(5, 8), 3.
    kl = kl_divergence(kind(logits=t / T), kind(logits=s / T))
    assert torch.allclose(divergence(t, s, T, task), T ** 2 * (kl.sum(1) if kl.ndim == 2 else kl).mean(), atol=1e-5)


# ---- no training image can be recovered from what a preparation keeps

def forms(x):
    "Ways to write images [n, 3, s, s] down as numbers, each of mean 0 and length 1."
    for v in (x, x.permute(0, 2, 3, 1), x.mean(1)):
        v = v.reshape(len(x), -1).double().numpy()
        v = v - v.mean(1, keepdims=True)
        yield v / np.linalg.norm(v, axis=1, keepdims=True)


def window_lengths(t, width):
    "How far each window of a tensor, read in a circle, is from being constant."
    t = np.concatenate([t, t[:width]]).astype(np.longdouble)   # sums of squares lose digits
    sums, squares = (np.concatenate([[0], np.cumsum(v)]) for v in (t, t * t))
    n = len(t) - width
    s, q = sums[width:][:n] - sums[:n], squares[width:][:n] - squares[:n]
    return np.sqrt(np.maximum(q - s * s / width, 0)).astype(float)


def likeness(state, x):
    "Largest |correlation| of each image, in each form, with any stretch of any tensor."
    best = np.zeros((3, len(x)))
    for t in state.values():
        t = t.double().numpy().ravel()
        for f, v in enumerate(forms(x)):
            if v.shape[1] > len(t): continue
            length = window_lengths(t, v.shape[1])
            length[length <= 1e-8 * np.linalg.norm(t)] = np.inf   # nothing there but rounding
            product = np.fft.irfft(np.fft.rfft(t) * np.conj(np.fft.rfft(v, len(t))), len(t))
            best[f] = np.maximum(best[f], np.abs(product / length).max(1))
    return best


def recovered(state, train, strangers):
    "Positions of training images that match better than half-way from the best stranger to identity."
    limit = (1 + likeness(state, strangers).max(1, keepdims=True)) / 2
    return np.flatnonzero((likeness(state, train) > limit).any(0)).tolist()


@pytest.fixture(scope='module')
def images(data_dir, smoke):
    "Training images of each data set, and as many of another."
    x = {n: World(n, data_dir, smoke).D['train'].tensors()[0] for n in ('celeba', 'mufac')}
    return dict(celeba=(x['celeba'], x['mufac'][:60]), mufac=(x['mufac'], x['celeba']))


@pytest.mark.parametrize('dataset', ['celeba', 'mufac'])
@pytest.mark.parametrize('name', [k for k in BUILT_IN if METHODS[k].prepare_fn])
def test_no_training_image_is_in_a_state(name, dataset, shared, smoke, images):
    state, _ = shared.prepared(shared.spec(smoke, dataset, 2, 0, name))
    assert state and recovered(state, *images[dataset]) == []


HIDDEN = dict(
    as_it_is=lambda x: x, scaled_and_shifted=lambda x: 1e-6 * x + 40, inverted=lambda x: -x,
    channels_last=lambda x: x.permute(1, 2, 0), grey=lambda x: x.mean(0), rolled=lambda x: x.roll((5, -7), (1, 2)),
    noisy=lambda x: x + .1 * torch.randn(x.shape), in_bytes=lambda x: ((x + 1) * 127.5).to(torch.uint8))


@pytest.mark.parametrize('how', HIDDEN)
def test_an_image_in_a_state_is_found(how, images):
    torch.manual_seed(0)
    copied = HIDDEN[how](images['celeba'][0][17]).flatten().float()
    between = copied.std() * torch.randn(2, 5000) + copied.mean()
    state = dict(weights=torch.randn(64, 64), memory=torch.cat([between[0], copied, between[1]]))
    assert 17 in recovered(state, *images['celeba'])   # others of the same person may look like it
    assert likeness(state, images['celeba'][0]).max(0).argmax() == 17
    assert recovered(dict(memory=torch.cat([*between])), *images['celeba']) == []
