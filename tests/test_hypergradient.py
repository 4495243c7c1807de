"""The exact hypergradient against double backward (fp32) and finite differences (fp64) on a ViT, dropout in h_φ on."""
import pytest
import timm
import torch

from oneshui.metaunlearn import MetaLoss, hypergradient, hypergradient_oracle, meta_objective, outputs, unlearning_step


def world(dtype, multilabel, detach, inputs=('logits', 'features', 'targets', 'identities')):
    torch.manual_seed(1); c = 7
    model = (
        timm.create_model(
            'vit_base_patch16_224', img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=c
        )
        .to(dtype)
        .eval()
    )
    h = MetaLoss(c, 48, 5, inputs, hidden=32).to(dtype).train()
    label = lambda n: (torch.rand(n, c) < .5).to(dtype) if multilabel else torch.randint(0, c, (n,))
    S = (torch.randn(5, 3, 32, 32, dtype=dtype), label(5), torch.arange(5))
    batches = [[(torch.randn(n, 3, 32, 32, dtype=dtype), label(n)) for _ in range(2)] for n in (8, 8, 3)]
    def outer(θ_u):
        for (xf, yf), (xv, yv) in batches:
            def share(xf=xf, yf=yf, xv=xv, yv=yv):
                with torch.no_grad(): v0 = model(xv)
                return (
                    len(yf)
                    / 19
                    * meta_objective(
                        (outputs(model, θ_u, xf)[0], yf),
                        (v0, yv),
                        (outputs(model, θ_u, xv)[0], yv),
                        detach=detach,
                        scaled=detach,
                    )
                )
            yield share
    return model, h, S, outer


flat = lambda gs: torch.cat([g.flatten() for g in gs])


@pytest.mark.parametrize('multilabel', [True, False])
@pytest.mark.parametrize('detach', [True, False])
def test_equals_double_backward_in_fp32(multilabel, detach):
    model, h, S, outer = world(torch.float32, multilabel, detach)
    (ours, a), (oracle, b) = hypergradient(model, h, S, .3, outer, mask=3), hypergradient_oracle(model, h, S, .3, outer, mask=3)
    assert (flat(ours) - flat(oracle)).norm() < 1e-4 * flat(oracle).norm() and abs(a - b) < 1e-5 * abs(b)
    assert all(p.grad is None for p in model.parameters())


def test_inputs_without_identities():
    model, h, S, outer = world(torch.float64, True, True, ('logits', 'features'))
    assert torch.allclose(
        flat(hypergradient(model, h, S, 0.3, outer)[0]),
        flat(hypergradient_oracle(model, h, S, 0.3, outer)[0]),
        rtol=1e-8,
    )


def test_equals_finite_differences_in_fp64():
    model, h, S, outer = world(torch.float64, True, False)
    g = hypergradient(model, h, S, .3, outer, mask=5)[0]
    for seed in range(4):
        torch.manual_seed(seed); d = [torch.randn_like(p) for p in h.parameters()]
        def A(t):
            with torch.no_grad(): [p.add_(t * x) for p, x in zip(h.parameters(), d)]
            θ_u, _ = unlearning_step(model, h, S, .3, mask=5)
            with torch.no_grad():
                a = sum(s().item() for s in outer(θ_u))
                [p.sub_(t * x) for p, x in zip(h.parameters(), d)]
            return a
        measured = (A(1e-5) - A(-1e-5)) / 2e-5; predicted = sum((a * b).sum() for a, b in zip(g, d)).item()
        assert abs(measured - predicted) < 1e-5 * abs(measured) + 1e-9


def test_another_mask_is_another_gradient():
    model, h, S, outer = world(torch.float64, True, True)
    assert not torch.allclose(
        flat(hypergradient(model, h, S, 0.3, outer, mask=1)[0]), flat(hypergradient(model, h, S, 0.3, outer, mask=2)[0])
    )
