"""MetaStep: exact gradients, what it reads, what it keeps, what it refuses."""
import copy

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from oneshui.baselines import _projected, get_method
from oneshui.data import Pixels, make_request, read_faces
from oneshui.metastep import SIZES, Simulation, StepLoss, StepSizes, direction, expected_error, input_bands, meta_gradient
from oneshui.metaunlearn import outputs
from oneshui.metrics import task_loss
from oneshui.vit import ImageSet, create_model, predict, support_set

flat = lambda gs: torch.cat([g.flatten() for g in gs])


@pytest.fixture(scope='module', params=['celeba', 'mufac'])
def world(request, data_dir, smoke):
    faces = read_faces(request.param, data_dir)
    r = make_request(faces, 2, 0)
    px = Pixels(faces, smoke.model.image_size, None)
    D = {k: ImageSet(px, getattr(r, k)) for k in ('train', 'val', 'forget')}
    model = create_model(smoke.model, D['val'].n_classes, 0).eval()
    return model, D, support_set(px, r.support)


@pytest.mark.parametrize('multilabel', [True, False])
def test_gradients_equal_double_backward(multilabel):
    torch.manual_seed(0)
    c = 5
    net = (
        timm.create_model(
            'vit_base_patch16_224', img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=c
        )
        .double()
        .eval()
    )
    label = lambda n: (torch.rand(n, c) < .5).double() if multilabel else torch.randint(0, c, (n,))
    x, y, xf, yf = torch.randn(3, 3, 32, 32).double(), label(3), torch.randn(6, 3, 32, 32).double(), label(6)
    basis = {
        k: input_bands(torch.cov(torch.randn(m.weight.flatten(1).shape[1], 999)).double())
        for k, m in _projected(net).items()
    }
    H, M = StepSizes(net, 'spectrum', basis).double(), StepLoss(c, 24, 'both', 16).double()
    torch.nn.init.normal_(M.h.net[-2].weight)
    for p in (H.total, H.tensor, H.band): torch.nn.init.normal_(p, -1., .3)
    objective = lambda θ: (expected_error(outputs(net, θ, xf)[0], yf).mean() - .3).abs()
    A = meta_gradient(net, H, M, x, y, objective); params = [*H.parameters(), *M.parameters()]
    with sdpa_kernel(SDPBackend.MATH):
        θ = {k: p.detach().requires_grad_() for k, p in net.named_parameters()}
        g = dict(zip(θ, torch.autograd.grad(M(outputs(net, θ, x), y), list(θ.values()), create_graph=True)))
        norm = sum((t ** 2).sum() for t in g.values()).sqrt()
        step = H({k: t / norm for k, t in g.items()})
        a = objective({k: θ[k].detach() - step[k] for k in θ})
        oracle = torch.autograd.grad(a, params)
    assert abs(A - a.item()) < 1e-12 and (flat([p.grad for p in params]) - flat(oracle)).norm() < 1e-9 * flat(oracle).norm()
    assert all(p.grad is None for p in net.parameters())


def test_the_start_is_negative_gradient_whatever_the_size_of_the_loss(world):
    model, D, S = world
    x, y = S.tensors()
    g = torch.autograd.grad(task_loss(model(x), y), list(model.parameters()))
    for loss in ('task', 'both'):
        u, norm = direction(model, StepLoss(D['val'].n_classes, model.num_features, loss, 32), x, y)
        assert (
            torch.allclose(flat(u.values()), -flat(g) / flat(g).norm(), atol=1e-5)
            and abs(float(flat(u.values()).norm()) - 1) < 1e-4
        )


@pytest.mark.parametrize('sizes', SIZES)
@pytest.mark.parametrize('loss', ['task', 'both'])
def test_unlearning_needs_the_support_set_and_the_stored_state_only(world, sizes, loss, tmp_path):
    model, D, S = world
    m = get_method('metastep')
    hp = dict(simulated_size=2, requests=2, calibration=1, sizes=sizes, loss=loss, hidden=16)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    state = m.prepare(model, D['train'], D['val'], hp)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / 's.safetensors')
    again = load_file(tmp_path / 's.safetensors')
    a, b = (m.unlearn(model, S, s, hp) for s in (state, again))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )
    assert any(not torch.equal(p, before[k]) for k, p in a.named_parameters()) and all(
        torch.isfinite(p).all() for p in a.parameters()
    )
    if (sizes, loss) == ('tensor', 'task'):
        assert sum(v.numel() for v in state.values()) < 0.01 * sum(
            p.numel() for p in model.parameters()
        ), 'the small variant keeps a few numbers'


def test_predicted_labels_are_the_models_own(world):
    model, D, S = world
    m = get_method('metastep')
    hp = dict(simulated_size=2, requests=1, calibration=0, sizes='tensor', labels='predicted')
    state = m.prepare(model, D['train'], D['val'], hp)
    other = copy.copy(S); other.y = 1 - S.y if S.y.is_floating_point() else (S.y + 1) % D['val'].n_classes
    a, b = (m.unlearn(model, s, state, hp) for s in (S, other))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    given = m.unlearn(model, other, state, hp | dict(labels='given'))
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), given.parameters()))


def test_simulated_requests_look_at_the_right_people(world):
    model, D, _ = world
    sim = Simulation(model, D['train'], D['val'], 2, np.random.default_rng(0))
    who = D['train'].identity
    s, f = sim.request(); looked = sim.look(s, f); (_, rows_f), (_, rows_r), (val, _) = looked[1]
    assert (
        len(s) == 2
        and set(who[rows_f]) <= set(who[s])
        and not set(rows_f) & set(s)
        and not set(who[rows_r]) & set(who[s])
        and val is D['val']
    )
    θ = sim.θ
    A = float(sim.objective(θ, looked))
    gap = (
        expected_error(predict(model, D['train'])[rows_f], D['train'].y[rows_f]).mean()
        - expected_error(predict(model, D['val']), D['val'].y).mean()
    )
    assert abs(A - abs(float(gap))) < 1e-4, 'a step of length zero keeps everybody and forgets nobody'
    seen = set(who[s])
    [seen.update(who[sim.request()[0]]) for _ in range(len(sim.queue))]
    assert seen == {i for i in np.unique(who) if (who == i).sum() > 1}, 'everybody asks once'


def test_what_is_refused(world):
    model, D, S = world; m = get_method('metastep')
    with pytest.raises(ValueError, match='sizes = "layer": valid are spectrum, tensor, model'):
        m.prepare(model, D['train'], D['val'], dict(simulated_size=2, sizes='layer'))
    with pytest.raises(TypeError, match='missing hyper-parameter simulated_size'):
        m.prepare(model, D['train'], D['val'], {})
    flat_model = copy.deepcopy(model)
    [torch.nn.init.zeros_(p) for p in flat_model.parameters()]
    x = torch.zeros(1, 3, *S.tensors()[0].shape[2:])
    class Still(torch.nn.Module):
        h = None
        def forward(self, z, y): return 0. * z[0].sum()
    with pytest.raises(FloatingPointError, match='length 0, so there is no direction'):
        direction(flat_model, Still(), x, None)


class Convolutional(torch.nn.Module):
    "A network without tokens, with a grouped convolution and batch statistics: somebody's own."
    def __init__(self, n_classes):
        super().__init__()
        n = torch.nn
        self.body = n.Sequential(
            n.Conv2d(3, 8, 3, 2, 1),
            n.BatchNorm2d(8),
            n.ReLU(),
            n.Conv2d(8, 8, 3, 2, 1, groups=8),
            n.ReLU(),
            n.AdaptiveAvgPool2d(2),
            n.Flatten(),
            n.Linear(32, n_classes),
        )
    def forward(self, x): return self.body(x)


@pytest.mark.parametrize('sizes', SIZES)
def test_a_network_of_ones_own(world, sizes):
    _, D, S = world
    torch.manual_seed(0)
    model = Convolutional(D['val'].n_classes).eval()
    m = get_method('metastep')
    hp = dict(simulated_size=2, requests=2, calibration=1, sizes=sizes)
    state = m.prepare(model, D['train'], D['val'], hp)
    after = m.unlearn(model, S, state, hp)
    x, y = S.tensors()
    with torch.no_grad():
        assert expected_error(after(x), y).mean() > expected_error(model(x), y).mean(), 'a step uphill'
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), after.buffers())), 'batch statistics stay'
