"""Trainings: the schedule by hand, the naive loop as oracle, no bit lost on the way."""
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from oneshui import vit
from oneshui.core import NumbersError, PresetError
from oneshui.data import Pixels, RoughPixels, make_faces
from oneshui.metrics import score, task_loss
from oneshui.vit import ImageSet, ModelSpec, TrainSpec, create_model, fit, learning_rate
from oneshui.vit import predict, support_set

EDGE = 16
TINY = ModelSpec(image_size=EDGE, weights='none',
                 options=dict(patch_size=8, embed_dim=16, depth=1, num_heads=2))
SPEC = TrainSpec(epochs=3, batch_size=8, lr=.05, warmup_epochs=1, crop=1, clip=1.,
                 precision='fp32', workers=0)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "A network this small only waits for a second one, long where the machine is busy."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def with_(spec, **changes): return type(spec)(**spec.model_dump() | changes)


def noise(root):
    "Twenty noisy images of five people, three attributes."
    r, names = np.random.default_rng(0), [f'{i}.png' for i in range(20)]
    for n in names:
        Image.fromarray(r.integers(0, 256, (EDGE, EDGE, 3), np.uint8)).save(root / n)
    who = [f'p{i % 5}' for i in range(20)]
    y = r.integers(0, 2, (20, 3))
    return make_faces('noise', root, names, who, y, 'multilabel', ['a', 'b', 'c'])


def two_sets(pixels):
    return [ImageSet(pixels, rows) for rows in np.split(np.arange(20), [14])]


@pytest.fixture(scope='module')
def pixels(tmp_path_factory):
    here = tmp_path_factory.mktemp('noise')
    return Pixels(noise(here), EDGE, here)


@pytest.fixture
def sets(pixels): return two_sets(pixels)


def trained(sets, spec=SPEC, *where, seed=0):
    "A model of seed 0, or a resumed one, and its log."
    model = create_model(TINY, 3, seed)
    return model, fit(model, *sets, spec, 1, *where, quiet=True)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# The schedule

@pytest.mark.parametrize('epoch, progress, rate', [
    (0, .5, .25e-3), (1, 0., .5e-3), (1, 1., 1e-3), (2, 0., 1e-3), (2, .9, 1e-3),
    (16, 0., .5e-3), (9, 0., 1e-3 * .5 * (1 + math.sqrt(.5)))])
def test_learning_rate_by_hand(epoch, progress, rate):
    "Warm-up over 2 of 30 epochs, then a cosine over 28; half of it is done after 14."
    assert math.isclose(learning_rate(TrainSpec(), epoch, progress), rate)


def test_the_released_schedule_never_ends():
    rate = lambda s: learning_rate(TrainSpec(schedule=s), 29)
    assert math.isclose(rate('cosine'), .5e-3 * (1 - math.cos(math.pi / 28)))
    assert math.isclose(rate('released'), .5e-3 * (1 - math.cos(math.pi * 3 / 30)))


def test_one_epoch_has_no_warm_up():
    assert learning_rate(TrainSpec(epochs=1, warmup_epochs=5), 0, .5) == 1e-3


def test_the_scheduler_gives_these_rates():
    spec, images = with_(SPEC, epochs=4, warmup_epochs=2), 20   # 3 iterations an epoch
    opt = vit.optimiser(torch.nn.Linear(1, 1), spec)
    for start in (0, 2):
        schedule = vit.scheduled(opt, spec, images, start)
        for i in range(3 * start, 12):
            asked = learning_rate(spec, i // 3, (i % 3 + 1) / 3)
            assert opt.param_groups[0]['lr'] == asked
            opt.step(); schedule.step()


# Training

def naive_fit(model, train, val, spec, seed):
    opt = torch.optim.SGD(model.parameters(), momentum=spec.momentum,
                          weight_decay=spec.weight_decay)
    best, steps = -1, math.ceil(len(train) / spec.batch_size)
    for epoch in range(spec.epochs):
        torch.manual_seed(1_000_003 * seed + epoch); model.train()
        for i, (x, y) in enumerate(train.batches(spec.batch_size, True, spec.crop), 1):
            for g in opt.param_groups: g['lr'] = learning_rate(spec, epoch, i / steps)
            opt.zero_grad(); task_loss(model(x), y).backward()
            if spec.clip: torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip)
            opt.step()
        found = score(predict(model, val), val.y)
        if found > best: best, kept = found, vit.weights_of(model)
    return kept


@pytest.mark.parametrize('changes', [{}, dict(crop=.3), dict(clip=None, momentum=0.),
                                     dict(schedule='released', weight_decay=0.)])
def test_fit_is_the_naive_loop(sets, changes):
    spec, model = with_(SPEC, **changes), create_model(TINY, 3, seed=1)
    fit(model, *sets, spec, seed=2, quiet=True)
    naive = naive_fit(create_model(TINY, 3, seed=1), *sets, spec, 2)
    assert same(vit.weights_of(model), naive)


def test_the_kept_epoch_is_the_first_best_one(sets, monkeypatch):
    found, real, kept = iter([10., 30., 30., 20.]), vit.weights_of, []
    monkeypatch.setattr(vit, 'validate', lambda *a: next(found))
    monkeypatch.setattr(vit, 'weights_of', lambda m: kept.append(real(m)) or kept[-1])
    model, log = trained(sets, with_(SPEC, epochs=4))
    assert log.kept.tolist() == [False, True, False, False]
    assert len(kept) == 2 and same(model.state_dict(), kept[1])
    assert log.columns.tolist() == ['epoch', 'loss', 'val', 'lr', 'kept']


def test_another_seed_gives_other_weights(sets):
    a, b = create_model(TINY, 3), create_model(TINY, 3)
    fit(a, *sets, SPEC, seed=0, quiet=True)
    fit(b, *sets, SPEC, seed=1, quiet=True)
    assert not same(a.state_dict(), b.state_dict())


def test_a_training_that_explodes_says_so(sets):
    with pytest.raises(NumbersError, match='is (nan|inf) in epoch 1.*Lower train.lr'):
        trained(sets, with_(SPEC, lr=1e30, clip=None))


# Resume

@pytest.mark.parametrize('changes', [{}, dict(crop=.3), dict(momentum=0.)])
@pytest.mark.parametrize('stop', [1, 2, 3])
def test_stopped_and_resumed_is_exact(sets, tmp_path, monkeypatch, stop, changes):
    spec, real = with_(SPEC, **changes), vit.save_training
    class Stop(Exception): pass
    def save(folder, model, opt, best, rows):
        real(folder, model, opt, best, rows)
        if len(rows) == stop: raise Stop
    monkeypatch.setattr(vit, 'save_training', save)
    with pytest.raises(Stop): trained(sets, spec, tmp_path)
    monkeypatch.setattr(vit, 'save_training', real)
    resumed, log = trained(sets, spec, tmp_path, seed=7)
    whole, whole_log = trained(sets, spec)
    assert log.equals(whole_log) and same(resumed.state_dict(), whole.state_dict())


def test_a_power_cut_while_saving_costs_one_epoch(sets, tmp_path, monkeypatch):
    "Tensors of the second epoch are written, the JSON is not: the first one counts."
    real, times = vit.write_atomically, []
    def write(path, text):
        times.append(1)
        if len(times) == 2: raise KeyboardInterrupt
        real(path, text)
    monkeypatch.setattr(vit, 'write_atomically', write)
    with pytest.raises(KeyboardInterrupt): trained(sets, SPEC, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        'state.json', 'epoch-1.safetensors', 'epoch-2.safetensors'}
    resumed, whole = trained(sets, SPEC, tmp_path, seed=7)[0], trained(sets)[0]
    assert same(resumed.state_dict(), whole.state_dict())
    assert {p.name for p in tmp_path.iterdir()} == {'state.json', 'epoch-3.safetensors'}


def test_a_killed_process_resumes_to_the_same_weights(tmp_path):
    code = textwrap.dedent('''
        import os, sys
        from pathlib import Path
        from test_vit import EDGE, Pixels, SPEC, noise, torch, trained, two_sets, vit
        torch.set_num_threads(int(sys.argv[2]))   # sums in the same order
        real, here = vit.save_training, Path(sys.argv[1])
        def save(folder, model, opt, best, rows):
            real(folder, model, opt, best, rows)
            if len(rows) == 2: os._exit(9)        # the power goes
        vit.save_training = save
        trained(two_sets(Pixels(noise(here), EDGE, here)), SPEC, here / 'state')
    ''')
    asked = [sys.executable, '-c', code, str(tmp_path), str(torch.get_num_threads())]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    env = os.environ | dict(PYTHONPATH=path)
    r = subprocess.run(asked, capture_output=True, text=True, env=env)
    assert r.returncode == 9, r.stderr[-2000:]
    sets = two_sets(Pixels(noise(tmp_path), EDGE, tmp_path))
    resumed, _ = trained(sets, SPEC, tmp_path / 'state', seed=7)
    whole, _ = trained(sets)
    assert same(resumed.state_dict(), whole.state_dict())


# Images

@pytest.mark.parametrize('workers', [0, 2])
def test_with_and_without_a_memory_map(pixels, workers):
    "The same batches, also where processes decode them, also in another order."
    from_disk = ImageSet(Pixels(pixels.faces, EDGE, None), np.arange(9)[::-1])
    mapped = ImageSet(pixels, np.arange(9)[::-1])
    assert from_disk.pixels.map is None and mapped.pixels.map is not None
    def seeded(images, *how): torch.manual_seed(3); return list(images.batches(4, *how))
    for shuffle in (False, True):
        a = seeded(from_disk, shuffle, None, 'cpu', workers)
        b = seeded(mapped, shuffle)
        assert [len(y) for _, y in a] == [4, 4, 1]
        assert all(torch.equal(t, t_) for s, s_ in zip(a, b) for t, t_ in zip(s, s_))


def test_images_of_another_size_agree_too(pixels):
    "Decoded by a loader's process or at once: one resize, not two kinds."
    raw = ImageSet(Pixels(pixels.faces, 2 * EDGE, None), np.arange(4))
    (x, _), = raw.batches(4); (x_, _), = raw.batches(4, workers=1)
    assert x.shape == (4, 3, 2 * EDGE, 2 * EDGE) and torch.equal(x, x_)


@pytest.mark.parametrize('cached', [True, False])
def test_flips_are_all_that_happens_at_1(pixels, cached):
    if not cached: pixels = Pixels(pixels.faces, EDGE, None)
    images = ImageSet(pixels, np.arange(20))
    torch.manual_seed(0)
    (x, _), (plain, _) = next(images.batches(20, augment=1)), images.tensors()
    as_is, mirrored = ((x == p).flatten(1).all(1) for p in (plain, plain.flip(-1)))
    assert (as_is | mirrored).all() and as_is.any() and mirrored.any()
    assert torch.equal(images.tensors()[0], plain), 'the memory map is left as it was'


def test_a_support_set_holds_nothing_else(pixels):
    rows = np.array([3, 17]); S = support_set(pixels, rows)
    assert set(vars(S)) == {'x', 'y', 'identity'}
    kept = S.x.numpy(), S.y.numpy(), S.identity
    assert [len(a) for a in kept] == [2, 2, 2]
    whole = pixels.map.base if isinstance(pixels.map.base, np.ndarray) else pixels.map
    assert not any(np.shares_memory(a, b) for a in kept
                   for b in (whole, pixels.faces.targets, pixels.faces.identity))
    assert torch.equal(S.tensors()[0], ImageSet(pixels, rows).tensors()[0])
    assert [len(y) for _, y in S.batches(1)] == [1, 1]


def test_rough_pixels_by_hand(tmp_path):
    "Every third column is white: without antialiasing, all that is seen is white."
    stripes = np.zeros((9, 9, 3), np.uint8); stripes[:, 1::3] = 255
    Image.fromarray(stripes).save(tmp_path / '0.png')
    how = 'stripes', tmp_path, ['0.png'], ['p'], np.ones((1, 1)), 'multilabel', ['a']
    faces = make_faces(*how)
    rough, smooth = RoughPixels(faces, 3), Pixels(faces, 3, None)
    assert (rough.batch([0]) == 255).all() and smooth.batch([0]).max() < 200
    (x, _), (raw, _) = ImageSet(rough, [0]).tensors(), smooth[0]
    assert (x == 1).all() and raw.shape == (3, 9, 9), 'training crops from the file'
    whole = RoughPixels(faces, 9).batch([0])
    assert torch.equal(whole, Pixels(faces, 9, None).batch([0]).float())


# The network

def test_a_setting_of_its_default_renames_no_run():
    assert 'antialias' not in TINY.model_dump()
    rough = with_(TINY, antialias=False)
    assert rough.model_dump() == TINY.model_dump() | dict(antialias=False)
    assert ModelSpec(**rough.model_dump()) == rough != TINY


def test_a_resnet_has_what_its_head_reads():
    net = create_model(ModelSpec(arch='resnet18', image_size=EDGE, weights='none'), 3)
    logits, pooled = vit.logits_and_cls(net, torch.randn(2, 3, EDGE, EDGE))
    assert pooled.shape == (2, 512) and torch.allclose(net.fc(pooled), logits)

@pytest.fixture
def small(monkeypatch):
    "A weights file of TINY without its head, and the specification that loads it."
    def write(path, **more):
        body = {k: v for k, v in create_model(TINY, 3, seed=5).state_dict().items()
                if not k.startswith('head')}
        save_file(body | more, path)
        return with_(TINY, weights=str(path))
    return write


def test_weights_from_a_file_and_a_fresh_head(tmp_path, small):
    spec = small(tmp_path / 'w.safetensors')
    a, b = create_model(spec, 3), create_model(spec, 3, seed=1)
    assert torch.equal(a.cls_token, load_file(tmp_path / 'w.safetensors')['cls_token'])
    assert torch.equal(a.cls_token, b.cls_token)
    assert not torch.equal(a.head.weight, b.head.weight)


@pytest.mark.parametrize('damage, says', [
    (lambda p: p.unlink(), 'no such weights file'),
    (lambda p: p.write_bytes(p.read_bytes()[:50]), 'cannot be used.*Restore the file'),
    (lambda p: p.write_text('not tensors'), 'cannot be used.*Restore the file')])
def test_an_unreadable_weights_file_is_named(tmp_path, small, damage, says):
    spec = small(tmp_path / 'w.safetensors'); damage(tmp_path / 'w.safetensors')
    with pytest.raises(PresetError, match=f'w.safetensors: {says}'):
        create_model(spec, 3)


def test_weights_of_another_network_are_named(tmp_path, small):
    spec = small(tmp_path / 'w.safetensors', stranger=torch.ones(1))
    with pytest.raises(PresetError, match='does not fit .*stranger.*Change model.arch'):
        create_model(spec, 3)
    wider = with_(spec, options=TINY.options | dict(embed_dim=32))
    with pytest.raises(PresetError, match='w.safetensors: cannot be used'):
        create_model(wider, 3)


@pytest.mark.parametrize('changes', [dict(arch='vit_of_nowhere'),
                                     dict(options=dict(dpeth=3))])
def test_a_network_that_does_not_exist(changes):
    with pytest.raises(PresetError, match='cannot be built.*Change model.arch'):
        create_model(with_(TINY, **changes), 3)


def test_logits_and_cls():
    model, x = create_model(TINY, 3), torch.randn(2, 3, EDGE, EDGE)
    logits, cls = vit.logits_and_cls(model, x)
    assert torch.allclose(logits, model(x)) and torch.allclose(model.head(cls), logits)
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * EDGE ** 2, 3))
    assert vit.logits_and_cls(plain, x)[1].shape == (2, 0)
