"""Methods: declared in one place, refused by name, blind to what they must not see, and
free of faces: no training image can be recovered from what a preparation keeps."""
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
from oneshui import methods
from oneshui.core import DataError, PresetError
from oneshui.data import Pixels, make_request
from oneshui.methods import METHODS, Count, Method, Positive, method
from oneshui.presets import as_released, check_parameters, for_request, load_preset
from oneshui.readers import read_faces
from oneshui.vit import ImageSet, create_model, support_set

ROOT = Path(__file__).resolve().parents[1]
BUILT_IN = [k for k, m in METHODS.items() if m.home.startswith('oneshui.')]
PREPARED = [k for k in BUILT_IN if METHODS[k].prepare_fn]


class World:
    "A network, image sets and portraits of a request of two."
    def __init__(self, name, data_dir, smoke):
        faces = read_faces(name, data_dir)
        r = make_request(faces, 2, 0)
        pixels = Pixels(faces, smoke.model.image_size, None)
        sets = ('train', 'retain', 'forget', 'val', 'test')
        self.name, self.smoke = name, smoke
        self.D = {d: ImageSet(pixels, getattr(r, d)) for d in sets}
        self.model = create_model(smoke.model, self.D['val'].n_classes, 0)
        self.S = support_set(pixels, r.support)
        self.full = {d: self.D[d] for d in ('retain', 'forget')}

    def settings(self, name):
        return for_request(name, self.smoke.hyper(self.name, name, 2), 2)

    def prepare(self, name, hp):
        torch.manual_seed(0)
        return METHODS[name].prepare(self.model, self.D['train'], self.D['val'], hp)

    def unlearn(self, name, state, hp, **full):
        return METHODS[name].unlearn(self.model, self.S, state, hp, **full)


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
    return model
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    "A package of somebody else's, installed: a module and its entry point."
    (tmp_path / 'shrinkage.py').write_text(OUTSIDE)
    info = tmp_path / 'shrinkage-1.0.dist-info'
    info.mkdir()
    said = 'Metadata-Version: 2.1\nName: shrinkage\nVersion: 1.0\n'
    (info / 'METADATA').write_text(said)
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
    rows = methods.method_rows()
    assert rows.index('neggrad') < rows.index('shrink') < rows.index('scrub')
    assert methods.method_title('shrink') == 'Shrink' and 'shrink' in methods.one_shot()
    hp = dict(factor=.5, rounds=2)
    u = world.unlearn('shrink', world.prepare('shrink', hp), hp)
    assert torch.equal(u.head.weight, world.model.head.weight / 4)


def test_a_method_from_outside_is_found_by_its_entry_point(outside):
    ask = ('from oneshui.methods import METHODS, method_rows; '
           'print(METHODS["shrink"].home, "shrink" in method_rows())')
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(outside), str(ROOT)]))
    r = subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True,
                       env=env, cwd=outside)
    assert r.stdout.split() == ['shrinkage', 'True'], r.stderr


def test_a_name_is_taken_once(registry):
    def neggrad(model, support, state): return model
    neggrad.__module__ = 'elsewhere'
    says = '"neggrad" is declared in oneshui.methods and again in elsewhere. Rename'
    with pytest.raises(PresetError, match=says): method('Mine')(neggrad)


def test_declarations_that_cannot_work_are_refused(registry):
    def prepare(model, train, val, *, k: int = 1): return {}
    def two_values(model, support, state, *, k: int = 2): return model
    with pytest.raises(PresetError, match='k has one default to prepare with'):
        method('Two values', prepare=prepare)(two_values)
    with pytest.raises(PresetError, match='access = "ful". Valid: one-shot, full'):
        method('Typo', access='ful')
    assert 'two_values' not in METHODS


def test_rows_and_titles():
    known = ['pretrain', 'retrain', *BUILT_IN]
    ours = [k for k in methods.method_rows() if k in known]
    assert ours == ['pretrain', 'retrain', 'neggrad', 'ssd', 'pgu', 'jit',
                    'metaunlearn', 'metastep', 'scrub', 'bad_teacher']
    titles = [methods.method_title(k) for k in ('pretrain', 'neggrad', 'scrub')]
    assert titles == ['Pretrain', 'NegGrad', 'SCRUB †']


# ---- settings

@pytest.mark.parametrize('name, hp, says', [
    ('neggrad', dict(), ['method neggrad', 'setting lr is missing', 'Valid: lr']),
    ('neggrad', dict(lr=0), ['setting lr = 0', 'greater than 0']),
    ('neggrad', dict(lr=.1, eta=.2), ['unknown setting eta', 'Valid: lr']),
    ('neggrad', dict(lr='much'), ["setting lr = 'much'", 'valid number']),
    ('neggrad', dict(lr=float('nan')), ['setting lr = nan']),
    ('pgu', dict(lr=1, epochs=2, gamma=1.5), ['gamma = 1.5', 'less than or equal']),
    ('pgu', dict(lr=1, epochs=2.5, gamma=.5), ['setting epochs = 2.5', 'integer']),
    ('pgu', dict(lr=1, epochs=0, gamma=.5, multilabel='all'),
     ['setting epochs = 0', "multilabel = 'all'", "'released'"]),
    ('ssd', dict(dampening=1, selection=1, batch_size=0), ['setting batch_size = 0']),
])
def test_a_wrong_setting_is_refused_by_name(name, hp, says):
    with pytest.raises(PresetError) as e: METHODS[name].check(hp)
    for part in says: assert part in str(e.value)


def test_unknown_method_lists_the_valid_ones():
    says = 'method "forget_it" is unknown. Valid: neggrad, ssd, pgu'
    with pytest.raises(PresetError, match=says): METHODS['forget_it']


def test_check_leaves_what_differs_from_the_defaults():
    check, some = METHODS['ssd'].check, dict(dampening=1, selection='50')
    assert check(some | dict(batch_size=128)) == dict(dampening=1., selection=50.)
    assert check(some | dict(batch_size=64))['batch_size'] == 64
    assert check(check(some)) == check(some)


def test_each_moment_reads_its_own_settings(world):
    assert world.prepare('ssd', {})   # λ and α are not needed yet
    for wrong in (dict(batchsize=1), dict(batch_size=0)):
        with pytest.raises(PresetError): world.prepare('ssd', wrong)
        with pytest.raises(PresetError):
            world.unlearn('ssd', {}, wrong | dict(dampening=1, selection=1))
    assert world.prepare('jit', dict(lr=1, sigma=1)) == {}


def test_bare_and_future_annotations_are_read(registry):
    def bare(model, support, state, *, anything=3, lr: 'Positive' = .1, n: Count = 2): 0
    m = Method('bare', 'Bare', 'one-shot', '', 'C0', 1, None, bare, __name__)
    assert not m.required
    assert m.check(dict(anything='x', lr=.1, n=2)) == dict(anything='x')
    with pytest.raises(PresetError, match='lr = -1'): m.check(dict(lr=-1))


# ---- what a method sees, and what it leaves alone

def test_one_shot_methods_get_the_portraits_and_nothing_else(world, registry):
    seen = []
    @method('Spy')
    def spy(model, support, state, *, lr: Positive = 1.):
        seen.append((support, list(state), lr))
        return model
    world.unlearn('spy', dict(kept=torch.ones(1)), {})
    assert seen == [(world.S, ['kept'], 1.)]
    assert not hasattr(world.S, 'pixels') and len(world.S.x) == 2


@pytest.mark.parametrize('name', BUILT_IN)
def test_a_method_gets_what_its_access_says(name, world):
    hp, one_shot = world.settings(name), METHODS[name].access == 'one-shot'
    ways = [dict(retain=world.D['retain'])] + [world.full if one_shot else {}]
    says = 'must not see retain or forget' if one_shot else 'hand it retain and forget'
    for given in ways:
        with pytest.raises(DataError, match=says): world.unlearn(name, {}, hp, **given)


@pytest.mark.parametrize('name', BUILT_IN)
def test_the_model_handed_in_is_unchanged(name, world):
    before, hp = copy.deepcopy(world.model.state_dict()), world.settings(name)
    full = world.full if METHODS[name].access == 'full' else {}
    u = world.unlearn(name, world.prepare(name, hp), hp, **full)
    assert u is not world.model and not u.training
    assert all(torch.equal(v, before[k]) for k, v in world.model.state_dict().items())
    assert all(p.grad is None for p in world.model.parameters())
    assert all(torch.isfinite(p).all() for p in u.parameters())
    assert any(not torch.equal(p, before[k]) for k, p in u.named_parameters())


def test_scrub_without_forget_epochs_never_looks_at_those_to_forget(world):
    class Locked:
        def batches(self, *_): raise AssertionError('D_f was read')
    full = dict(retain=world.D['retain'], forget=Locked())
    hp = dict(lr=1e-3, epochs=1)
    ask = lambda F: world.unlearn('scrub', {}, hp | dict(forget_epochs=F), **full)
    ask(0)
    with pytest.raises(AssertionError, match='D_f was read'): ask(1)


# ---- the parts

class Images:
    "Tensors that behave like a set of images."
    def __init__(self, x, y): self.x, self.y = x, y
    def batches(self, size, *_, **__):
        for k in range(0, len(self.y), size):
            yield self.x[k:k + size], self.y[k:k + size]


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(),
                         nn.Conv2d(4, 8, 3, 1, 2, dilation=2), nn.ReLU(),
                         nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(),
                         nn.Linear(288, 5)).eval()


def test_importance_is_the_mean_squared_gradient_of_batches(cnn):
    x, y = torch.randn(6, 3, 16, 16), torch.randint(0, 5, (6,))
    found, each = methods.importance(cnn, Images(x, y), 4), []
    for k in (slice(0, 4), slice(4, 6)):
        cnn.zero_grad()
        nn.functional.cross_entropy(cnn(x[k]), y[k]).backward()
        each.append({n: p.grad ** 2 for n, p in cnn.named_parameters()})
    for n, v in found.items():
        assert torch.allclose(v, (each[0][n] + each[1][n]) / 2, atol=1e-7)


def test_importance_is_taken_over_shuffled_batches(cnn):
    asked = []
    class Shuffled(Images):
        def batches(self, size, shuffle=False, **_):
            asked.append(shuffle)
            return super().batches(size)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(0, 5, (4,))
    methods.importance(cnn, Shuffled(x, y), 2)
    assert asked == [True]


def test_ssd_is_pretrain_to_the_digit_where_nothing_exceeds_the_threshold(world):
    state, before = world.prepare('ssd', {}), list(world.model.parameters())
    damp = lambda α: world.unlearn('ssd', state, dict(dampening=.5, selection=α))
    assert all(torch.equal(a, b) for a, b in zip(damp(1e30).parameters(), before))
    everything = list(damp(1e-9).parameters())
    assert any(not torch.equal(a, b) for a, b in zip(everything, before))
    assert all((a.abs() <= b.abs()).all() for a, b in zip(everything, before))


def test_input_rows_times_the_weight_are_the_layers_answer(cnn):
    seen = {}
    for k, m in methods.projected_layers(cnn).items():
        m.register_forward_hook(lambda m, a, out, k=k: seen.update({k: (m, a[0], out)}))
    cnn(torch.randn(2, 3, 16, 16))
    assert list(seen) == ['0', '2', '6'], 'a grouped convolution sees parts of a patch'
    for layer, a, out in seen.values():
        rows = methods.input_rows(layer, a) @ layer.weight.flatten(1).T + layer.bias
        if out.ndim == 4: out = out.flatten(2).transpose(1, 2).reshape(rows.shape)
        assert torch.allclose(rows, out, atol=1e-5)


def test_covariance_does_not_depend_on_the_batch_size(cnn):
    images = Images(torch.randn(7, 3, 16, 16), torch.zeros(7))
    a, b = (methods.input_covariance(cnn, images, size) for size in (7, 2))
    assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-3) for k in a)
    assert not any(m._forward_hooks for m in cnn.modules()), 'the hooks are gone'


SHARES = [(0., 1), (.5, 1), (.65, 1), (.7, 2), (.95, 3), (1., 4)]


@pytest.mark.parametrize('gamma, rank', SHARES)
def test_projection_protects_a_share_of_the_spectrum(gamma, rank):
    U, _ = torch.linalg.qr(torch.randn(4, 4).double())
    s = torch.tensor([6., 2, 1, .01]).double()
    P = methods.projection(U @ torch.diag(s ** 2) @ U.T, gamma)
    assert torch.allclose(P, P.T) and torch.allclose(P @ P, P)
    assert round(float(P.trace())) == rank and torch.allclose(P @ U[:, 0], U[:, 0])


def test_a_projected_step_leaves_retained_answers_alone():
    torch.manual_seed(0)
    shapes = (4, 16), (50, 4), (3, 16), (3, 4, 2, 2)
    few, many, g, kernel = (torch.randn(*s).double() for s in shapes)
    retained, away = many @ few, methods.away   # four of sixteen dimensions
    P = methods.projection(retained.T @ retained, .99999)
    moved = lambda step: (retained @ step.T).abs().max()
    assert moved(away(g, P)) < 1e-4 * moved(g) and away(g, P).norm() > .1 * g.norm()
    assert torch.equal(away(kernel, P).flatten(1), away(kernel.flatten(1), P))


def test_pgu_moves_weights_only_and_less_the_more_it_protects(world):
    state, far = world.prepare('pgu', {}), []
    before = dict(world.model.named_parameters())
    weights = [f'{k}.weight' for k in methods.projected_layers(world.model)]
    for γ in (0., .9, 1.):
        u = world.unlearn('pgu', state, dict(lr=.1, epochs=2, gamma=γ))
        moved = {k: (p - before[k]).norm().item() for k, p in u.named_parameters()}
        assert not any(v for k, v in moved.items() if k not in weights)
        far.append(sum(moved.values()))
    assert far[0] > far[1] > 0 and far[2] < 1e-3 * far[0]


def test_pgu_loss_by_hand():
    p = torch.tensor([[.2, .5, .3]])
    by_hand = -np.log(1 - .5 + .05) + .2 * float((p * p.log()).sum())
    found = methods.pgu_loss(p.log(), torch.tensor([1]))
    assert found.item() == pytest.approx(by_hand, abs=1e-5)
    logits, y = torch.zeros(1, 40, requires_grad=True), torch.zeros(1, 40)
    y[0, [3, 7]] = 1
    loss = {how: methods.pgu_loss(logits, y, how) for how in ('positive', 'released')}
    by_hand = -np.log(.55) - .2 * np.log(2)
    assert loss['positive'].item() == pytest.approx(by_hand, abs=1e-5)
    touched = {how: torch.autograd.grad(v, logits)[0][0].nonzero().flatten().tolist()
               for how, v in loss.items()}
    assert touched['positive'] == [3, 7] and {0, 1} <= set(touched['released'])


KINDS = [('softmax', Categorical), ('sigmoid', Bernoulli)]


@pytest.mark.parametrize('task, kind', KINDS)
def test_divergence_is_torchs(task, kind):
    t, s, T = torch.randn(5, 8), torch.randn(5, 8), 3.
    kl = kl_divergence(kind(logits=t / T), kind(logits=s / T))
    want = T ** 2 * (kl.sum(1) if kl.ndim == 2 else kl).mean()
    assert torch.allclose(methods.divergence(t, s, T, task), want, atol=1e-5)


class Watched(Images):
    "Images, each a number, that note how they are asked for."
    def __init__(self, *numbers):
        x = torch.tensor(numbers)[:, None]
        super().__init__(x, (x[:, 0] > 0).long())
        self.asked = []
    def __len__(self): return len(self.y)
    def batches(self, size, shuffle, *_):
        self.asked.append((size, shuffle))
        return super().batches(size)


class Two(nn.Module):
    "Logits (0, w x)."
    def __init__(self, w=1.): super().__init__(); self.w = nn.Parameter(torch.tensor(w))
    def forward(self, x): return torch.cat([0 * x, self.w * x], 1)
    def reset_parameters(self): self.w.data.fill_(-3.)


def test_the_union_comes_once_an_epoch_in_random_order():
    stay, gone = Watched(*map(float, range(40))), Watched(100., 101., 102.)
    torch.manual_seed(0)
    epochs = [list(methods.mixed(stay, gone, 8, True)) for _ in range(200)]
    for found in epochs:
        assert [len(x) for x, _ in found] == [8, 8, 8, 8, 8, 3]
        x, mark = (torch.cat(part) for part in zip(*found))
        assert sorted(x[:, 0].tolist()) == [*range(40), 100, 101, 102]
        assert torch.equal(x[:, 0] >= 100, mark)
    none = np.mean([[not m.any() for _, m in found[:5]] for found in epochs])
    by_hand = np.prod([(40 - i) / (43 - i) for i in range(8)])   # none of 3 among 8
    assert none == pytest.approx(by_hand, abs=.04)
    assert gone.asked == 200 * [(8, True)]


def test_bad_teacher_by_hand():
    "One batch, one epoch: the teacher of each image is the random net or the original."
    full, lr = dict(retain=Watched(2.), forget=Watched(-1., .5)), .1
    hp = dict(lr=lr, epochs=1, batch_size=4)
    u = METHODS['bad_teacher'].unlearn(Two(), None, {}, hp, **full)
    s = lambda v: 1 / (1 + np.exp(-v))
    # d/dw of KL(teacher ‖ student) = (s(w x) − teacher's) x; then weight decay
    slope = [(s(2.) - s(2.)) * 2, (s(-1.) - s(3.)) * -1, (s(.5) - s(-1.5)) * .5]
    by_hand = 1 - lr * (np.mean(slope) + 5e-4)
    assert u.w.item() == pytest.approx(by_hand, abs=1e-6)


def test_scrub_by_hand():
    "Two epochs of one batch each; the first also forgets, from where KL has no slope."
    stay, gone, lr = Watched(2., -1.), Watched(.5), .1
    hp = dict(lr=lr, epochs=1, forget_epochs=1, kl_weight=0., task_weight=1.)
    ask = lambda **h: METHODS['scrub'].unlearn(Two(), None, {}, hp | h, retain=stay,
                                               forget=gone)
    s = lambda v: 1 / (1 + np.exp(-v))
    # forget step: slope 0 at the teacher, weight decay only; retain step: momentum .9
    w, v = 1., 5e-4
    w -= lr * v
    slope = np.mean([(s(2 * w) - 1) * 2, (s(-w) - 0) * -1]) + 5e-4 * w
    by_hand = w - lr * (.9 * v + slope)
    assert ask().w.item() == pytest.approx(by_hand, abs=1e-6)
    assert gone.asked == [(32, True)] and stay.asked == [(32, True)]
    ask(batch_size=7)
    assert gone.asked[1:] == [(7, True)] and stay.asked[1:] == [(7, True)]


# ---- as the authors' code does it

class Line(nn.Module):
    "Logits W x of images of one row."
    def __init__(self, w):
        super().__init__()
        self.fc = nn.Linear(len(w[0]), len(w), bias=False)
        self.fc.weight.data = torch.tensor(w)
    def forward(self, x): return self.fc(x.flatten(1))


def test_patches_at_every_pixel_by_hand():
    "3 × 3 pixels under a kernel of 2 × 2 with stride 2: one patch, or all four."
    conv = nn.Conv2d(1, 1, 2, stride=2, dilation=1)
    a = torch.arange(9.).view(1, 1, 3, 3)
    assert methods.input_rows(conv, a).tolist() == [[0, 1, 3, 4]]
    every = methods.input_rows(conv, a, everywhere=True)
    assert every.tolist() == [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]
    C = methods.input_covariance(nn.Sequential(conv), Images(a, torch.zeros(1)),
                                 everywhere=True)['0']
    assert torch.equal(C, every.T @ every)


def test_the_released_covariance_is_of_crops_and_every_patch(cnn):
    asked = []
    class Watched(Images):
        def batches(self, size, shuffle=False, augment=None, *_, **__):
            asked.append(augment)
            return super().batches(size)
    x = Watched(torch.randn(4, 3, 16, 16), torch.randint(0, 5, (4,)))
    ours, theirs = (METHODS['pgu'].prepare(cnn, x, None, hp) for hp in (
        {}, dict(covariance='released')))
    assert asked == [None, .08]
    assert not torch.allclose(ours['0'], theirs['0']), 'stride 2: other patches'
    assert torch.allclose(ours['6'], theirs['6']), 'not under a Linear'
    hp = dict(lr=.1, epochs=1, gamma=.5, covariance='released')
    METHODS['pgu'].unlearn(cnn, x, theirs, hp)
    assert asked[2:] == [None, None], 'the portraits are as they are'


def test_jit_by_hand_over_two_batches():
    "The released step goes along the gradient of every batch so far."
    x, lr = torch.tensor([[1., -1., .2, -.4], [.5, 2., 1., 1.5]]), .1
    hp = dict(lr=lr, sigma=1., samples=1, batch_size=1)
    for released in (False, True):
        W, total = torch.eye(4), 0.
        torch.manual_seed(0)
        for row in x[:, None]:
            δ = row - methods.noisy(row, 1.)
            out = δ @ W.T
            g = (out / out.norm()).T @ row / δ.norm()
            total = total + g if released else g
            W = W - lr * total
        net, given = Line(torch.eye(4).tolist()), Images(x, torch.zeros(2).long())
        torch.manual_seed(0)
        u = METHODS['jit'].unlearn(net, given, {}, hp | dict(accumulate=released))
        assert torch.allclose(u.fc.weight, W, atol=1e-5), released


def test_answers_in_half_precision_by_hand():
    "bf16 keeps eight bits: 1 + 1/256 is 1, and what is said is float32 again."
    net = Line([[1., 1.]])
    x = torch.tensor([[1 + 1 / 256, 1 / 512]])
    assert methods.answers(net, x).item() == 1 + 1 / 256 + 1 / 512
    half = methods.answers(net, x, 'bf16')
    assert half.item() == 1. and half.dtype == torch.float32
    assert not methods.told(net, x, 'bf16').requires_grad


@pytest.mark.parametrize('name', ['pgu', 'scrub', 'bad_teacher'])
def test_half_precision_moves_a_little_elsewhere(world, name):
    hp = world.settings(name) | dict(lr=.1)
    state = world.prepare(name, hp)
    full = world.full if METHODS[name].access == 'full' else {}
    def moved(precision):
        torch.manual_seed(0)
        u = world.unlearn(name, state, hp | dict(precision=precision), **full)
        pairs = zip(u.parameters(), world.model.parameters())
        return torch.cat([(a - b).flatten().detach() for a, b in pairs])
    a, b = map(moved, ('fp32', 'bf16'))
    assert 0 < (a - b).norm() < .2 * a.norm()


SOFTMAX = dict(multilabel='softmax', precision='bf16')
RELEASED = dict(
    neggrad={}, ssd={}, metastep={}, jit=dict(accumulate=True), scrub=SOFTMAX,
    bad_teacher=SOFTMAX,
    pgu=dict(multilabel='released', covariance='released', precision='bf16'),
    metaunlearn=dict(singles='reuse', precision='bf16', tokens=False))


@pytest.mark.parametrize('name', BUILT_IN)
def test_one_switch_turns_every_difference(name, smoke):
    m, theirs = METHODS[name], as_released(smoke)
    assert m.released == RELEASED[name]
    ours = {k: p.default for k, p in m.settings.items()}
    assert all(ours[k] != v for k, v in m.released.items()), 'our default is another'
    assert theirs.name == 'smoke-released' and not theirs.model.antialias
    for d in smoke.cells:
        assert theirs.recipe(d).schedule == 'released'
        for n in smoke.cells[d].n_forget:
            table = theirs.hyper(d, name, n)
            assert table == smoke.hyper(d, name, n) | m.released
            m.check(for_request(name, table, n))
    found = check_parameters(dict(preset='smoke', released=True))[1]
    assert found == theirs.model_copy(update=dict(asked=found.asked))


# ---- the paper's numbers

FIVES = dict(lr=5e-3, forget_epochs=5)
PAPER = [   # data set, method, N_S, settings: the released table
    ('celebahq', 'ssd', 50, dict(dampening=.5, selection=10)),
    ('celebahq', 'ssd', 200, dict(dampening=.5, selection=10)),
    ('celeba', 'ssd', 200, dict(dampening=2, selection=50)),
    ('celebahq', 'pgu', 200, dict(lr=.01, epochs=10, gamma=.75)),
    ('celeba', 'pgu', 200, dict(lr=.01, epochs=10, gamma=.75)),
    ('mufac', 'pgu', 10, dict(lr=.1, epochs=10, gamma=.75)),
    ('celebahq', 'scrub', 50, dict(lr=1e-2, forget_epochs=5, augment=True)),
    ('celebahq', 'scrub', 200, dict(lr=1e-3, forget_epochs=5, augment=True)),
    ('celebahq', 'scrub', 500, dict(lr=5e-4, forget_epochs=7, augment=True)),
    ('celeba', 'scrub', 1, FIVES), ('celeba', 'scrub', 10, FIVES),
    ('celeba', 'scrub', 200, dict(lr=1e-3, forget_epochs=7)),
    ('celeba', 'scrub', 500, dict(lr=1e-3, forget_epochs=3)),
    ('mufac', 'scrub', 5, dict(lr=1e-3, forget_epochs=7)),
    ('mufac', 'scrub', 10, dict(lr=1e-3, forget_epochs=5, augment=True)),
    ('celebahq', 'bad_teacher', 50, dict(lr=1e-4)),
    ('celebahq', 'bad_teacher', 200, dict(lr=1e-4, batch_size=256)),
    ('celebahq', 'bad_teacher', 500, dict(lr=1e-5, batch_size=256)),
    ('celeba', 'bad_teacher', 500, dict(lr=1e-4, batch_size=256)),
    ('mufac', 'bad_teacher', 5, dict(lr=1e-3, augment=True)),
    ('celeba', 'metaunlearn', 500, dict(epochs=3, lr=1e-4, eta=.1)),
    ('celebahq', 'metaunlearn', 1, dict(epochs=3, lr=1e-4, eta=.1, simulated_size=50)),
    ('celeba', 'metaunlearn', 1, dict(epochs=3, lr=1e-3, eta=.1, simulated_size=10)),
    ('mufac', 'metaunlearn', 5, dict(epochs=10, lr=1e-2, eta=1e-3))]


@pytest.mark.parametrize('dataset, name, n, settings', PAPER)
def test_the_paper_preset_is_the_released_table(dataset, name, n, settings):
    paper = load_preset('paper')
    assert paper.hyper(dataset, name, n) == settings
    sizes = dict(ssd=128, pgu=128, jit=128, scrub=32, bad_teacher=32, metaunlearn=64)
    assert METHODS[name].settings['batch_size'].default == sizes[name]


def test_the_paper_preset_serves_every_request_size():
    paper = load_preset('paper')
    for d, more in (('celebahq', (20, 50)), ('celeba', (5, 10))):
        for n in (1, *more, 200, 500):
            for m in BUILT_IN: assert paper.hyper(d, m, n)
    for m in BUILT_IN: assert paper.hyper('mufac', m, 1), 'a substitute of ours'


# ---- no training image can be recovered from what a preparation keeps

def forms(x):
    "Ways to write images [n, 3, s, s] down as numbers, each of mean 0 and length 1."
    for v in (x, x.permute(0, 2, 3, 1), x.mean(1)):
        v = v.reshape(len(x), -1).double().numpy()
        v = v - v.mean(1, keepdims=True)
        yield v / np.linalg.norm(v, axis=1, keepdims=True)


def window_lengths(t, width):
    "How far each window of a tensor, read in a circle, is from being constant."
    n, t = len(t), np.concatenate([t, t[:width]]).astype(np.longdouble)
    sums, squares = (np.concatenate([[0], np.cumsum(v)]) for v in (t, t * t))
    s, q = sums[width:][:n] - sums[:n], squares[width:][:n] - squares[:n]
    return np.sqrt(np.maximum(q - s * s / width, 0)).astype(float)


def likeness(state, x):
    "Largest |correlation| of each image, in each form, with any stretch of any tensor."
    best = np.zeros((3, len(x)))
    for t in state.values():
        t = t.double().numpy().ravel()
        t = t - t.mean()
        for f, v in enumerate(forms(x)):
            if v.shape[1] > len(t): continue
            length = window_lengths(t, v.shape[1])
            length[length <= 1e-8 * np.linalg.norm(t)] = np.inf   # only rounding there
            spectrum = np.fft.rfft(t) * np.conj(np.fft.rfft(v, len(t)))
            found = np.abs(np.fft.irfft(spectrum, len(t)) / length)
            best[f] = np.maximum(best[f], found.max(1))
    return best


def recovered(state, train, strangers):
    "Training images that match better than half-way from the best stranger to a copy."
    limit = (1 + likeness(state, strangers).max(1, keepdims=True)) / 2
    return np.flatnonzero((likeness(state, train) > limit).any(0)).tolist()


@pytest.fixture(scope='module')
def images(data_dir, smoke):
    "Training images of each data set, and images of another."
    world = lambda name: World(name, data_dir, smoke)
    x = {n: world(n).D['train'].tensors()[0] for n in ('celeba', 'mufac')}
    return dict(celeba=(x['celeba'], x['mufac'][:60]), mufac=(x['mufac'], x['celeba']))


@pytest.mark.parametrize('dataset', ['celeba', 'mufac'])
@pytest.mark.parametrize('name', PREPARED)
def test_no_training_image_is_in_a_state(name, dataset, shared, smoke, images):
    state, _ = shared.prepared(shared.spec(smoke, dataset, 2, 0, name))
    assert state and recovered(state, *images[dataset]) == []


HIDDEN = dict(
    as_it_is=lambda x: x,
    scaled_and_lifted=lambda x: 1e-3 * x + 40,
    inverted=lambda x: -x,
    channels_last=lambda x: x.permute(1, 2, 0),
    grey=lambda x: x.mean(0),
    moved=lambda x: x.roll((1, -2), (1, 2)),
    noisy=lambda x: x + .1 * torch.randn(x.shape),
    in_bytes=lambda x: ((x + 1) * 127.5).to(torch.uint8))


@pytest.mark.parametrize('how', HIDDEN)
def test_an_image_in_a_state_is_found(how, images):
    torch.manual_seed(0)
    hidden = HIDDEN[how](images['celeba'][0][17]).flatten().float()
    before, after = hidden.std() * torch.randn(2, 5000) + hidden.mean()
    state = dict(weights=torch.randn(64, 64), memory=torch.cat([before, hidden, after]))
    assert 17 in recovered(state, *images['celeba'])   # and perhaps the same person's
    assert likeness(state, images['celeba'][0]).max(0).argmax() == 17
    assert recovered(dict(memory=torch.cat([before, after])), *images['celeba']) == []
