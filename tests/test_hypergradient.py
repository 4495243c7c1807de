"""The exact gradients of a step: double backward, finite differences, in fp64.

On a ViT and on a CNN without class token, for both tasks, with dropout in h_φ.
"""
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from oneshui.core import NumbersError
from oneshui.metastep import (CorrectedAscent, FixedSize, OneSize, SizePerBand,
                              SizePerTensor, Step, TaskAscent, dot)
from oneshui.metaunlearn import (INPUTS, MetaLoss, gradient, hypergradient,
                                 hypergradient_oracle, meta_objective, outputs,
                                 parameters_of, slope, unlearning_step)

N_CLASSES, SIZES = 5, (4, 4, 3)   # outputs; images in the batches of D_f
LITTLE = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)


def flat(tensors): return torch.cat([t.flatten() for t in tensors])


def vit():
    return timm.create_model('vit_base_patch16_224', num_classes=N_CLASSES, **LITTLE)


def cnn():
    "No tokens, a grouped convolution, batch statistics: somebody's own."
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU(),
                         nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(32, N_CLASSES))


def images(n, multilabel):
    "(images, targets)"
    y = torch.randint(0, N_CLASSES, (n,))
    if multilabel: y = (torch.rand(n, N_CLASSES) < .5).double()
    return torch.randn(n, 3, 32, 32).double(), y


def shares(θ_u, model, pairs, **options):
    "A, batch by batch."
    for (xf, yf), (xv, yv) in pairs:
        with torch.no_grad(): before = model(xv)
        forget, after = (outputs(model, θ_u, x)[0] for x in (xf, xv))
        sides = (forget, yf), (before, yv), (after, yv)
        yield len(yf) / sum(SIZES) * meta_objective(*sides, **options)


@pytest.fixture(params=[(vit, True), (vit, False), (cnn, True), (cnn, False)],
                ids=['vit, labels', 'vit, classes', 'cnn, labels', 'cnn, classes'])
def world(request):
    "Model, S, and outer, which takes A's options."
    build, multilabel = request.param
    torch.manual_seed(1)
    model = build().double().eval()
    S = *images(4, multilabel), torch.arange(4)
    pairs = [[images(n, multilabel) for _ in range(2)] for n in SIZES]
    return model, S, partial(shares, model=model, pairs=pairs)


def new_loss(model, inputs=INPUTS, kind=MetaLoss):
    torch.manual_seed(2)
    width = LITTLE['embed_dim'] if hasattr(model, 'forward_features') else 0
    return kind(N_CLASSES, width, 4, inputs=inputs, hidden=16).double()


ALGORITHM_1 = dict(distance='l2', scaled=False, detach=False)


@pytest.mark.parametrize('options', [{}, ALGORITHM_1], ids=['released', 'Algorithm 1'])
def test_equals_double_backward(world, options):
    model, S, outer = world
    h, outer = new_loss(model), partial(outer, **options)
    (A, ours), (B, oracle) = (form(model, h, S, .3, outer, mask=3)
                              for form in (hypergradient, hypergradient_oracle))
    assert A == pytest.approx(B, rel=1e-10)
    assert (flat(ours) - flat(oracle)).norm() < 1e-9 * flat(oracle).norm()
    assert all(p.grad is None for p in model.parameters())


def test_inputs_without_identities(world):
    model, S, outer = world
    h = new_loss(model, INPUTS[:2])
    ours, oracle = (form(model, h, S, .3, outer)[1]
                    for form in (hypergradient, hypergradient_oracle))
    assert torch.allclose(flat(ours), flat(oracle), rtol=1e-8, atol=1e-15)


def moved(parameters, directions, A, t):
    "A where the parameters are moved by t along the directions, and put back."
    with torch.no_grad():
        for p, d in zip(parameters, directions): p.add_(t * d)
        a = A()
        for p, d in zip(parameters, directions): p.sub_(t * d)
    return a


def agrees_with_finite_differences(parameters, grads, A):
    for seed in range(3):
        torch.manual_seed(seed)
        d = [torch.randn_like(p) for p in parameters]
        up, down = (moved(parameters, d, A, t) for t in (1e-5, -1e-5))
        measured, predicted = (up - down) / 2e-5, float(flat(grads) @ flat(d))
        assert abs(measured - predicted) < 1e-5 * abs(measured) + 1e-9


def test_equals_finite_differences(world):
    model, S, outer = world
    h, outer = new_loss(model), partial(outer, **ALGORITHM_1)
    def A():
        with torch.enable_grad(): θ_u = unlearning_step(model, h, S, .3, mask=5)
        return float(sum(outer(θ_u)))
    _, grads = hypergradient(model, h, S, .3, outer, mask=5)
    agrees_with_finite_differences(list(h.parameters()), grads, A)


def test_another_mask_is_another_gradient(world):
    model, S, outer = world
    h = new_loss(model)
    grads = lambda mask: flat(hypergradient(model, h, S, .3, outer, mask)[1])
    a, b, again = map(grads, (1, 2, 1))
    assert torch.equal(a, again) and not torch.allclose(a, b)


def small(H):
    "Sizes that differ, and leave the model alive."
    torch.manual_seed(3)
    for p in H.parameters(): nn.init.normal_(p, std=.2)
    nn.init.constant_(H.total, -3.)
    return H


def bands(model):
    H = SizePerBand(model).double()
    for k in H.layers:
        a = torch.randn(50, len(H.basis(k)[0])).double()
        H.set_basis(k, a.T @ a)
    return H


LOSSES = dict(task=lambda model: TaskAscent(), learned=new_loss,
              corrected=partial(new_loss, kind=CorrectedAscent))
SIZES_OF = dict(fixed=lambda model: FixedSize(.3),
                one=lambda model: small(OneSize(model).double()),
                tensor=lambda model: small(SizePerTensor(model).double()),
                band=lambda model: small(bands(model)))


@pytest.mark.parametrize('unit', [True, False], ids=['unit', 'raw'])
@pytest.mark.parametrize('sizes', SIZES_OF)
@pytest.mark.parametrize('loss', LOSSES)
def test_a_step_finds_its_way_back(world, loss, sizes, unit):
    "dA/dψ and dA/dφ of every kind of step."
    model, S, outer = world
    step = Step(model, LOSSES[loss](model), SIZES_OF[sizes](model), unit)
    if loss == 'corrected': nn.init.normal_(step.M.net[-2].weight)
    taken = step(parameters_of(model), S, mask=3)
    step.backward(taken, slope(outer, taken.θ_u)[1])
    if not step.parameters(): return
    oracle = double_backward(step, S, outer)
    ours = [p.grad for p in step.parameters()]
    assert (flat(ours) - flat(oracle)).norm() < 1e-8 * flat(oracle).norm()
    assert all(p.grad is None for p in model.parameters())


def double_backward(step, S, outer):
    x, y, who = S
    with sdpa_kernel(SDPBackend.MATH):
        θ = {k: p.requires_grad_() for k, p in parameters_of(step.model).items()}
        g = gradient(step.M(outputs(step.model, θ, x), y, who, 3), θ, create_graph=True)
        norm = dot(g, g).sqrt() if step.unit else 1.
        way = step.H({k: t / norm for k, t in g.items()})
        A = sum(outer({k: p - way[k] for k, p in θ.items()}))
        return gradient(A, dict(enumerate(step.parameters()))).values()


def test_sizes_equal_finite_differences(world):
    model, S, outer = world
    H = SIZES_OF['band'](model)
    step, outer = Step(model, TaskAscent(), H), partial(outer, **ALGORITHM_1)
    def A():
        with torch.enable_grad(): taken = step(parameters_of(model), S)
        return float(sum(outer(taken.θ_u)))
    taken = step(parameters_of(model), S)
    step.backward(taken, slope(outer, taken.θ_u)[1])
    ψ = step.parameters()
    agrees_with_finite_differences(ψ, [p.grad for p in ψ], A)


def test_no_direction_no_step():
    model = cnn().eval()
    for p in model.parameters(): nn.init.zeros_(p)
    S = torch.zeros(1, 3, 32, 32), 0, 0
    taken = lambda M: Step(model, M, FixedSize(1.))(parameters_of(model), S)
    still = taken(lambda z, y, who, mask: 0. * z[0].sum())
    assert all((still.θ_u[k] == p).all() for k, p in parameters_of(model).items())
    with pytest.raises(NumbersError, match='so there is no direction'):
        taken(lambda z, y, who, mask: torch.inf * z[0].sum())
