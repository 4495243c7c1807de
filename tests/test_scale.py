"""Arithmetic that can be checked by hand."""
import pytest
import timm
import torch
from torch import nn

from oneshui.scale import a100_hours, step_flops, step_memory

PIXEL = nn.Sequential(nn.Flatten(), nn.Linear(3, 5), nn.Linear(5, 7))


@pytest.fixture(scope='module')
def vit():
    with torch.device('meta'):
        return timm.create_model('vit_base_patch16_224', img_size=32, patch_size=8,
                                 embed_dim=16, depth=4, num_heads=2, num_classes=3)


def test_flops_of_linear_layers_by_hand():
    "Forward 2·in·out; back, as much for weights and, but for the first, for the input."
    forward = 2 * 3 * 5 + 2 * 5 * 7
    train = 2 * forward + 2 * 5 * 7
    assert step_flops(PIXEL, 1) == dict(forward=forward, train=train)


def test_counting_leaves_the_model_alone():
    step_flops(PIXEL, 1); step_memory(PIXEL, 1, 2)
    assert all(p.device.type == 'cpu' and p.grad is None for p in PIXEL.parameters())


def test_memory_of_linear_layers_by_hand():
    "32 images: each layer keeps its input, 3 and 5 numbers an image."
    n, kept = 3 * 5 + 5 + 5 * 7 + 7, 32 * (3 + 5)
    full, half = step_memory(PIXEL, 1, 32, bytes_each=4), step_memory(PIXEL, 1, 32)
    assert full == dict(weights=4 * n, gradients=4 * n, optimizer=4 * n,
                        activations=4 * kept, total=12 * n + 4 * kept)
    assert half == dict(weights=6 * n, gradients=4 * n, optimizer=4 * n,
                        activations=2 * kept, total=14 * n + 2 * kept)


def test_activations_grow_with_the_batch_and_with_the_depth(vit):
    a = lambda b, **more: step_memory(vit, 32, b, **more)['activations']
    assert a(4) < a(8) <= 2 * a(4) and a(16) - a(8) == 2 * (a(8) - a(4))
    # checkpointing: four inputs [17, 16] and one block of four
    assert a(8, checkpointing=True) < a(8) / 2
    rest = a(8, checkpointing=True) - a(8) / 4
    assert rest <= 2 * 8 * (5 * 17 * 16 + 3 * 32 * 32 + 100)


def test_a_meta_model_is_left_without_checkpointing(vit):
    step_memory(vit, 32, 2, checkpointing=True)
    assert not vit.grad_checkpointing


def test_hours():
    assert a100_hours(3600, 312e12, utilisation=1) == 1
    assert a100_hours(7200, 1e12, .5, 1e12) == pytest.approx(4)
