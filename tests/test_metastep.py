"""The learner and its parts: what each changes, what is kept, what is refused."""
import copy
import itertools
import math

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import wasserstein_distance
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics.functional.classification import binary_average_precision

from oneshui.core import DataError, NumbersError, PresetError
from oneshui.data import Pixels, RoughPixels, make_request
from oneshui.metastep import (FACTORS, Alignment, FixedSize, ForgetAndKeep, KeepTask,
                              Known, Simulation, Spread, Step, TaskAscent,
                              expected_error, find_start, fixed_learner,
                              outside_layers, value, wasserstein)
from oneshui.metaunlearn import (MetaLoss, Published, batch_loss, gradient, learn_loss,
                                 meta_objective, outputs, parameters_of, restored,
                                 shape_of, slope, unlearn_once)
from oneshui.methods import METHODS
from oneshui.metrics import batch_score, task_loss
from oneshui.presets import as_released
from oneshui.readers import read_faces
from oneshui.vit import ImageSet, ModelSpec, create_model, predict, support_set

SIZES, LOSSES = ('one', 'tensor', 'band'), ('task', 'corrected', 'learned')
OBJECTIVES = ('forget_and_keep', 'spread', 'alignment', 'scrub')
QUICK = dict(simulated_size=2, requests=2, calibration=1, batch_size=8)
PAPER = dict(simulated_size=2, eta=.1, epochs=1, hidden=16)


def flat(tensors): return torch.cat([t.flatten() for t in tensors])


@pytest.fixture(scope='module', params=['celeba', 'mufac'])
def world(request, data_dir, smoke):
    "A model, its image sets, a request's portraits."
    faces = read_faces(request.param, data_dir)
    r = make_request(faces, 2, 0)
    px = Pixels(faces, smoke.model.image_size, None)
    D = {k: ImageSet(px, getattr(r, k)) for k in ('train', 'val', 'forget')}
    model = create_model(smoke.model, D['val'].n_classes, 0)
    return model, D, support_set(px, r.support)


def prepared(world, name, **hp):
    model, D, _ = world
    torch.manual_seed(0)
    return METHODS[name].prepare(model, D['train'], D['val'], hp)


def unlearned(world, name, **hp):
    model, _, S = world
    return METHODS[name].unlearn(model, S, prepared(world, name, **hp), hp)


# One learner

ALGORITHM_1 = dict(distance='l2', scaled=False, detach=False)


@pytest.mark.parametrize('options', [
    {}, dict(batch_size=3, dropout=0., singles='reuse'),
    dict(inputs=['logits', 'targets'], **ALGORITHM_1)], ids=range(3))
def test_metaunlearn_is_the_loop_of_chapter_3(world, options):
    "To the last bit: φ, A of every request, θ_u."
    model, D, S = world
    p = Published(**PAPER | dict(epochs=2) | options)
    torch.manual_seed(0)
    loop = learn_loss(model, D['train'], D['val'], p)
    part = {k: options[k] for k in options if k in ALGORITHM_1}
    hp = PAPER | dict(epochs=2) | {k: v for k, v in options.items() if k not in part}
    state = prepared(world, 'metaunlearn', **hp, objective=part)
    assert state.keys() == loop.keys()
    assert all(torch.equal(state[k], loop[k]) for k in loop)
    a = METHODS['metaunlearn'].unlearn(model, S, state, hp)
    b = unlearn_once(copy.deepcopy(model), S, loop, p)
    assert all(torch.equal(s, t) for s, t in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_every_combination_of_parts(world, objective):
    "Each runs, moves what is learned and nothing else, and is like no other."
    model, D, S = world
    ends = []
    for sizes, loss in itertools.product(SIZES, LOSSES):
        made = loss if loss == 'task' else dict(kind=loss, hidden=8)
        hp = QUICK | dict(objective=objective, sizes=sizes, loss=made)
        state = prepared(world, 'metastep', **hp)
        learned = {k for k in state if k[:2] in ('H.', 'M.')} - {'H.norm'}
        assert ('H.tensor' in state) == (sizes != 'one')
        assert ('H.band' in state) == (sizes == 'band')
        assert any(k[:2] == 'M.' for k in state) == (loss != 'task')
        assert len(state['history']) == 2 and state['calibration'].shape == (1, 9)
        assert all(torch.isfinite(state[k].float()).all() for k in learned)
        for k in {'H.tensor', 'H.band'} & learned: assert state[k].abs().max() > 0
        ends.append(METHODS['metastep'].unlearn(model, S, state, hp))
    ends = [flat(m.parameters()) for m in (model, *ends)]
    for a, b in itertools.combinations(ends, 2): assert not torch.equal(a, b)


@pytest.mark.parametrize('change', [
    dict(objective=dict(unlearned=0)), dict(objective=dict(original=0)),
    dict(objective=dict(original=0, kept=1)), dict(objective='scrub'),
    dict(objective=dict(distance='l2')), dict(objective=dict(scaled=False)),
    dict(retain_step=True),
    dict(objective=dict(detach=False)), dict(objective='forget_and_keep'),
    dict(inputs=['logits']), dict(epochs=2), dict(batch_size=3)], ids=str)
def test_ablations_of_metaunlearn_change_it(world, change):
    states = [prepared(world, 'metaunlearn', **PAPER | c) for c in ({}, change)]
    a, b = (flat(v.float() for v in s.values()) for s in states)
    assert a.shape != b.shape or not torch.equal(a, b)
    assert any(k[:2] == 'r.' for k in states[1]) == ('retain_step' in change)


@pytest.mark.parametrize('change', [
    dict(requests=3), dict(lr=.1), dict(predicted_labels=True),
    dict(objective=dict(keep=0)), dict(batch_size=4), dict(sizes=dict(edges=[.5]))],
    ids=str)
def test_settings_of_metastep_change_it(world, change):
    a, b = (flat(unlearned(world, 'metastep', **QUICK | c).parameters())
            for c in ({}, change))
    assert torch.isfinite(b).all() and not torch.equal(a, b)


def test_calibration_multiplies_all_sizes_together(world):
    without, state = (prepared(world, 'metastep', **QUICK | dict(calibration=n))
                      for n in (0, 2))
    tow, moved = state['calibration'], state['H.total'] - without['H.total']
    factor = math.exp(moved)
    chosen = np.abs(FACTORS - factor).argmin()
    assert FACTORS[chosen] == pytest.approx(factor, rel=1e-4)
    mean = tow.mean(0)
    assert float(mean[chosen]) == pytest.approx(float(mean.max()), abs=1e-3)
    assert 'calibration' not in without
    for k in without: assert k == 'H.total' or torch.equal(without[k], state[k]), k


def test_several_steps_go_on_from_each_other(world):
    model, _, S = world
    m, state = METHODS['metaunlearn'], prepared(world, 'metaunlearn', **PAPER)
    twice = m.unlearn(m.unlearn(model, S, state, PAPER), S, state, PAPER)
    at_once = m.unlearn(model, S, state, PAPER | dict(steps=2))
    assert torch.equal(flat(twice.parameters()), flat(at_once.parameters()))


def test_a_retain_step_starts_where_the_first_one_arrived(world):
    model, D, _ = world
    sim = Simulation(model, D['train'], D['val'], size=2, batch_size=8)
    shape = *shape_of(model, D['val']), len(sim.people)
    h, h_r = (MetaLoss(*shape, hidden=8) for _ in 'hr')
    first = fixed_learner(sim, h, Alignment(), .1, 1e-3, 1)
    first.retain = fixed_learner(sim, h_r, KeepTask(), .1, 1e-3, 1)
    φ, steps = copy.deepcopy(h.state_dict()), []
    def watch(learner):
        step = learner.step
        learner.step = lambda θ, S, mask: steps.append(step(θ, S, mask)) or steps[-1]
        learner.step.M, learner.step.backward = step.M, step.backward
    for learner in (first, first.retain): watch(learner)
    first.learn(itertools.islice(sim.epochs(1), 1))
    one, two = steps
    assert all(torch.equal(one.θ_u[k], two.θ[k]) for k in one.θ)
    assert all(torch.equal(one.θ[k], p) for k, p in model.named_parameters())
    assert any(not torch.equal(φ[k], v) for k, v in h.state_dict().items()), 'φ moved'


# As the authors' code does it

def test_the_released_step_leaves_what_belongs_to_no_layer(world):
    model = world[0]
    u = unlearned(world, 'metaunlearn', **PAPER, tokens=False)
    outside = outside_layers(model)
    assert outside == ['cls_token', 'pos_embed']
    same = {k for (k, a), b in zip(model.named_parameters(), u.parameters())
            if torch.equal(a, b)}
    assert same == set(outside)


def test_what_is_held_is_held_on_the_way_back_too():
    "dA/dφ with two parameters held, against double backward, in double precision."
    torch.manual_seed(0)
    little = dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2)
    net = timm.create_model('vit_base_patch16_224', num_classes=5, **little)
    net = net.double().eval()
    x, y, who = torch.randn(3, 3, 32, 32).double(), torch.arange(3), torch.arange(3)
    h, held = MetaLoss(5, 24, 3, hidden=16).double(), outside_layers(net)
    A = lambda θ_u: (task_loss(outputs(net, θ_u, x)[0], y) - 2.) ** 2
    step = Step(net, h, FixedSize(.5, held), unit=False)
    taken = step(parameters_of(net), (x, y, who), mask=3)
    step.backward(taken, slope(lambda θ_u: [A(θ_u)], taken.θ_u)[1])
    with sdpa_kernel(SDPBackend.MATH):
        θ = {k: p.requires_grad_() for k, p in parameters_of(net).items()}
        g = gradient(h(outputs(net, θ, x), y, who, 3), θ, create_graph=True)
        θ_u = {k: p if k in held else p - .5 * g[k] for k, p in θ.items()}
        naive = torch.autograd.grad(A(θ_u), list(h.parameters()))
    ours = flat(p.grad for p in h.parameters())
    assert (ours - flat(naive)).norm() < 1e-9 * flat(naive).norm()


def test_A_in_half_precision_is_seen_in_half_precision(world):
    "Logits in bf16, their losses in fp32: sixteen bits before the score, none after."
    model, D, _ = world
    sim = Simulation(model, D['train'], D['val'], 2, 8, precision='bf16')
    (lo, y), (before, _) = sim.train.says([0, 1], sim.θ), sim.val.says([0, 1])
    assert lo.dtype == before.dtype == torch.bfloat16
    assert batch_loss(lo, y).dtype == torch.float32
    assert torch.equal(task_loss(lo, y), task_loss(lo.float(), y))
    exact = Known(model, D['train']).says([0, 1], sim.θ)[0]
    assert 0 < (lo - exact).abs().max() < .02 * exact.abs().max()
    a, b = (prepared(world, 'metaunlearn', **PAPER, precision=k)['history']
            for k in ('fp32', 'bf16'))
    assert not torch.equal(a, b) and torch.allclose(a, b, atol=.05)


def test_the_schedule_of_meta_training(world):
    "One step of AMSGrad a request, no weight decay, a cosine by epochs."
    model, D, _ = world
    sim = Simulation(model, D['train'], D['val'], size=2, batch_size=8)
    h = MetaLoss(*shape_of(model, D['val']), len(sim.people), hidden=8)
    learner = fixed_learner(sim, h, Alignment(), eta=.1, lr=1e-3, epochs=3)
    group, seen = learner.opt.param_groups[0], []
    assert group['amsgrad'] and group['weight_decay'] == 0
    learner.opt.register_step_pre_hook(lambda *_: seen.append(group['lr']))
    learner.learn(sim.epochs(3))
    several = np.unique(D['train'].identity, return_counts=True)[1] > 1
    each = math.ceil(several.sum() / 2)
    by_hand = np.repeat([1e-3, .75e-3, .25e-3], each)   # ½ (1 + cos π e/3)
    assert seen == pytest.approx(by_hand)


def test_every_batch_of_the_forgotten_meets_one_of_strangers(world):
    model, D, _ = world
    sim = Simulation(model, D['train'], D['val'], size=4, batch_size=5)
    r, = sim.requests(1)
    looked = Alignment().look(sim, r)
    assert [len(f) for f, _, _ in looked[:-1]] == [5] * (len(looked) - 1)
    assert np.array_equal(np.concatenate([f for f, _, _ in looked]), r.forget)
    assert sum(share for _, share, _ in looked) == pytest.approx(1)
    for _, _, v in looked: assert len(set(v)) == len(v) == 5


def test_a_resnet_takes_part(world):
    "Batch statistics, a pooled map instead of a class token; nothing to hold."
    _, D, S = world
    spec = ModelSpec(arch='resnet18', image_size=32, weights='none')
    net = create_model(spec, D['val'].n_classes, 0)
    assert shape_of(net, D['val']) == (D['val'].n_classes, 512)
    assert outside_layers(net) == []
    few = dict(D, train=D['train'].subset(np.argsort(D['train'].identity)[:16]))
    hp = PAPER | dict(tokens=False, inputs=['logits', 'features', 'targets'])
    u = unlearned((net, few, S), 'metaunlearn', **hp)
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), u.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), u.buffers()))


# What is asked for

def test_a_batch_is_scored_on_what_somebody_has():
    "Three images, three attributes: one ranked 1, 0, 1; one that nobody has; one tied."
    lo = torch.tensor([[3., 0., 1.], [2., 1., 1.], [1., 2., -1.]])
    y = torch.tensor([[1., 0., 0.], [0., 0., 1.], [1., 0., 0.]])
    first, tied = (1 / 1 + 2 / 3) / 2, 1 / 2      # the tied pair ends at rank 2
    assert float(batch_score(lo, y)) == pytest.approx((first + tied) / 2)
    # A multiplies the losses by one minus that, and d is smooth L1
    f, v = batch_loss(lo, y), batch_loss(-lo, y)
    assert float(f) == pytest.approx(float(task_loss(lo, y)) * (1 - (first + tied) / 2))
    gap = abs(float(f - v))
    by_hand = gap ** 2 / 2 if gap < 1 else gap - .5
    both = meta_objective((lo, y), (-lo, y), (-lo, y))
    assert float(both) == pytest.approx(2 * by_hand, rel=1e-5)
    assert batch_score(lo, 0 * y) == 0, 'nobody has anything: the loss stays as it is'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_fast_score_is_torchmetrics_own(dtype):
    "Attributes that nobody has are left out; ties, frequent in half precision, count."
    torch.manual_seed(0)
    for _ in range(5):
        lo, y = torch.randn(64, 40).to(dtype), (torch.rand(64, 40) < .05).float()
        p, seen = lo.sigmoid().float(), y.any(0)
        want = np.mean([binary_average_precision(p[:, j], y[:, j].long())
                        for j in range(40) if seen[j]])
        assert not seen.all()
        assert float(batch_score(lo, y)) == pytest.approx(float(want), abs=1e-6)


def test_simulated_requests_look_at_the_right_people(world):
    model, D, _ = world
    sim = Simulation(model, D['train'], D['val'], size=2, batch_size=32)
    r, = sim.requests(1)
    (_, forget), (_, retain), (val, _) = sim.sample(r)
    asked = set(sim.who[r.support])
    assert len(asked) == 2 and set(sim.who[forget]) <= asked and val is sim.val
    assert not set(forget) & set(r.support) and not set(sim.who[retain]) & asked
    for s in sim.requests(len(sim.queue)): asked |= set(sim.who[s.support])
    several = {i for i in sim.who if (sim.who == i).sum() > 1}
    assert not sim.queue and asked == several, 'everybody has asked once'


def test_no_step_keeps_everybody_and_forgets_nobody(world):
    model, D, _ = world
    sim = Simulation(model, D['train'], D['val'], size=2, batch_size=500)
    r, = sim.requests(1)
    gap = sim.train.error[r.forget].mean() - sim.val.error.mean()
    for objective in (ForgetAndKeep(), ForgetAndKeep(keep=0)):
        A = value(objective.shares(sim, objective.look(sim, r), sim.θ))
        assert A == pytest.approx(abs(float(gap)), abs=1e-6)
    for objective in (Spread(), Spread(keep=0)):
        A = value(objective.shares(sim, objective.look(sim, r), sim.θ))
        far = wasserstein(sim.train.error[r.forget], sim.val.error)
        assert A == pytest.approx(float(far), abs=1e-6) and A >= abs(float(gap)) - .02


def test_spreads_of_as_many_images_are_compared_as_scipy_does():
    a, b = torch.rand(2, 40, generator=torch.manual_seed(0))
    want = wasserstein_distance(a.numpy(), b.numpy())
    assert float(wasserstein(a, b)) == pytest.approx(want, abs=1e-6)
    few = float(wasserstein(a, b.repeat_interleave(3)))
    assert few == pytest.approx(want, abs=1e-6), 'shares count, not images'
    assert wasserstein(a, a[torch.randperm(40)]) == 0, 'who is who does not'


def test_the_start_is_the_best_of_the_grid(world):
    "A flat correction changes nothing there: both go the way of ascent."
    model, D, _ = world
    starts = [prepared(world, 'metastep', **QUICK, loss=kind)['start']
              for kind in ('task', 'corrected')]
    assert torch.equal(*starts) and -4.01 < starts[0] / math.log(10) < -.49
    assert find_start.__defaults__ == (2,)


def test_ascent_goes_uphill(world):
    model, _, S = world
    x, y = S.tensors()
    g = torch.autograd.grad(task_loss(model(x), y), list(model.parameters()))
    taken = Step(model, TaskAscent(), lambda u: u)(parameters_of(model), (x, y, None))
    assert torch.allclose(flat(taken.u.values()), -flat(g) / flat(g).norm(), atol=1e-6)


# What is kept, and read

@pytest.mark.parametrize('sizes', SIZES)
def test_support_set_and_stored_state_suffice(world, sizes, tmp_path):
    model, _, S = world
    before, m = copy.deepcopy(model.state_dict()), METHODS['metastep']
    hp = QUICK | dict(sizes=sizes, loss=dict(kind='corrected', hidden=8))
    state = prepared(world, 'metastep', **hp)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / 's.safetensors')
    again = load_file(tmp_path / 's.safetensors')
    a, b = (flat(m.unlearn(model, S, s, hp).parameters()) for s in (state, again))
    assert torch.equal(a, b)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_size_a_tensor_keeps_a_few_numbers(world):
    kept = prepared(world, 'metastep', **QUICK, sizes='tensor')
    assert len(flat(kept.values())) < .01 * len(flat(world[0].parameters()))


def test_predicted_labels_are_the_models_own(world):
    model, D, S = world
    m, hp = METHODS['metastep'], QUICK | dict(sizes='tensor', predicted_labels=True)
    state, other = prepared(world, 'metastep', **hp), copy.copy(S)
    other.y = 1 - S.y if S.y.is_floating_point() else (S.y + 1) % D['val'].n_classes
    a, b, given = (flat(m.unlearn(model, s, state, h).parameters()) for s, h in (
        (S, hp), (other, hp), (other, hp | dict(predicted_labels=False))))
    assert torch.equal(a, b) and not torch.equal(a, given)


@pytest.mark.parametrize('sizes', SIZES)
def test_a_network_of_ones_own(world, sizes):
    "No tokens, a grouped convolution, batch statistics."
    _, D, S = world
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.AdaptiveAvgPool2d(2),
                        nn.Flatten(), nn.Linear(32, D['val'].n_classes)).eval()
    after = unlearned((own, D, S), 'metastep', **QUICK, sizes=sizes)
    x, y = S.tensors()
    with torch.no_grad(): before, then = (expected_error(m(x), y) for m in (own, after))
    assert then.mean() > before.mean(), 'a step uphill'
    assert all(torch.equal(a, b) for a, b in zip(own.buffers(), after.buffers()))
    unlearned((own, D, S), 'metaunlearn', **PAPER)


# Settings

@pytest.mark.parametrize('given, short', [
    (dict(sizes='tensor'), dict(sizes='tensor')), (dict(sizes='band'), {}),
    (dict(sizes=dict(kind='band', edges=[.5])), dict(sizes=dict(edges=(.5,)))),
    (dict(loss=dict(kind='learned', hidden=512)), dict(loss='learned')),
    (dict(objective=dict(keep=1)), {}),
    (dict(objective=dict(keep=0)), dict(objective=dict(keep=0.))),
    (dict(objective=dict(kind='scrub', T=2)),
     dict(objective=dict(kind='scrub', T=2.)))], ids=str)
def test_a_part_is_stored_in_its_shortest_form(given, short):
    m, known = METHODS['metastep'], dict(simulated_size=2)
    stored = m.check(known | given)
    assert stored == known | short and m.check(stored) == stored
    table = lambda hp: m.validated(hp, m.settings).model_dump()
    assert table(stored) == table(known | given)


@pytest.mark.parametrize('wrong, says', [
    (dict(sizes='layer'), "'band', 'tensor', 'one'"),
    (dict(sizes=dict(edges=[2.])), 'less than 1'), (dict(lr=0), 'greater than 0'),
    (dict(objective=dict(kep=1)), 'kep'), (dict(loss=dict(hidden=3)), 'hidden'),
    (dict(loss=dict(kind='learned', inputs=['identities'])), 'inputs')], ids=str)
def test_what_is_refused(wrong, says):
    with pytest.raises(PresetError, match=says):
        METHODS['metastep'].check(dict(simulated_size=2) | wrong)


def test_missing_settings_are_named():
    with pytest.raises(PresetError, match='simulated_size'):
        METHODS['metastep'].check({})
    with pytest.raises(PresetError, match='eta'):
        METHODS['metaunlearn'].check(dict(simulated_size=2))


def test_divergence_names_the_request_and_the_fix(world):
    model, D, _ = world
    with pytest.raises(NumbersError, match=r'A is \S+ at request 1\. Lower'):
        prepared(world, 'metaunlearn', **PAPER | dict(eta=1e30))
    with pytest.raises(NumbersError, match=r'A is \S+ at request 1\. Lower'):
        learn_loss(model, D['train'], D['val'], Published(**PAPER | dict(eta=1e30)))
    with pytest.raises(NumbersError, match=r'A is \S+ at request 2\. Lower'):
        prepared(world, 'metastep', **QUICK | dict(lr=1e3, calibration=0))


def test_a_stranger_has_no_embedding(world):
    model, _, S = world
    state, lost = prepared(world, 'metaunlearn', **PAPER), copy.copy(S)
    lost.identity = np.full(len(S), 10 ** 6)
    with pytest.raises(DataError, match='identity 1000000 is not one of'):
        METHODS['metaunlearn'].unlearn(model, lost, state, PAPER)
    hp = PAPER | dict(inputs=['logits', 'features', 'targets'])
    anonymous = prepared(world, 'metaunlearn', **hp)
    METHODS['metaunlearn'].unlearn(model, lost, anonymous, hp)


def test_what_a_state_has_of_a_module_comes_back(world):
    model, D, _ = world
    state = prepared(world, 'metaunlearn', **PAPER)
    h = MetaLoss(*shape_of(model, D['val']), len(state['identities']), hidden=16)
    assert all(torch.equal(v, state[f'h.{k}'])
               for k, v in restored(h, state, 'h').state_dict().items())
    assert not h.training and predict(model, D['forget']).isfinite().all()


def test_a_released_store_reads_rough_images_and_names_theirs_mia(shared, smoke):
    s = shared.spec(smoke, 'celeba', 2, 0, 'pretrain')
    theirs = as_released(smoke).model
    rough, own = (shared.pixels('celeba', size, theirs.antialias) for size in (16, 32))
    assert isinstance(rough, RoughPixels) and not isinstance(own, RoughPixels)
    plain = shared.metrics(s)
    shared.released = True
    try: named = shared.metrics(s)
    finally: shared.released = False
    forms = {k for k in plain if f'released_{k}' in plain}
    assert {'mia', 'mia_nonmember'} <= forms
    assert named == plain | {k: plain[f'released_{k}'] for k in forms}
