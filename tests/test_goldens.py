"""Goldens of units: a drawing, a split, a training, a step of each method, each metric.

A unit that moves while its version stands still is a mistake; the failure says which
version to raise and where. After raising it, or after adding a method,
`python tests/test_goldens.py ssd` writes the units with "ssd" in their name anew, and
without a word it writes all of tests/goldens.json. The tolerance is what another kind
of CPU meets: one unit amplifies rounding far less than a whole run does.
"""

import json
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import oneshui.runs  # noqa: F401, it declares all there is
from oneshui import portraits
from oneshui.data import Pixels, Request, make_faces, make_request, simulate_requests
from oneshui.methods import METHODS
from oneshui.metrics import METRICS, Outputs
from oneshui.presets import load_preset
from oneshui.readers import DATASETS
from oneshui.vit import ImageSet, TrainSpec, fit, predict, support_set

FILE = Path(__file__).with_name('goldens.json')
BUILT_IN = 'oneshui.'


def ours(registry):
    return sorted(k for k, v in registry.items() if v.home.startswith(BUILT_IN))


# ---- a world of noise: nothing in it depends on the drawings


@lru_cache
def faces(task):
    "24 people with 4 pictures of noise each, on disk."
    root, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    names = [f'{i}.png' for i in range(96)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(root / name)
    targets = (
        rng.random((96, 5)) < 0.4 if task == 'multilabel' else rng.integers(0, 5, 96)
    )
    return make_faces(
        'noise',
        root,
        names,
        np.repeat(np.arange(24), 4).astype(str),
        targets,
        task,
        list('abcde'),
    )


def network():
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    return timm.create_model('vit_base_patch16_224', num_classes=5, **size).eval()


def world(task):
    "Image sets of a request of two people."
    f = faces(task)
    pixels, r = Pixels(f, 32, None), make_request(f, 2, 0)
    D = {
        d: ImageSet(pixels, getattr(r, d))
        for d in ('train', 'retain', 'forget', 'val', 'test')
    }
    return D, support_set(pixels, r.support)


def settings(name):
    "The smoke preset's, for requests of two."
    hyper = load_preset('smoke').hyper('celeba', name, 2)
    return hyper | (
        dict(simulated_size=2) if 'simulated_size' in METHODS[name].settings else {}
    )


# ---- units: name -> (version, where it is declared, numbers)


def drawing():
    people = [
        (portraits.draw_person(1, i, i % 8 if i % 2 else None), i) for i in range(4)
    ]
    pictures = [
        portraits.render(p, portraits.draw_photo(1, i, j, p), 48)
        for p, i in people
        for j in range(2)
    ]
    return [v for a in pictures for v in (a.mean(), a.std(), *a.mean((0, 1)))]


def splits():
    r, rng = make_request(faces('multiclass'), 3, 1), np.random.default_rng(1)
    sets = [getattr(r, d) for d in ('support', 'forget', 'retain', 'val', 'test')]
    for s, f in simulate_requests(faces('multiclass').identity, r.train, 3, rng):
        sets += [s, f]
    return [
        v
        for s in sets
        for v in (len(s), float(np.dot(np.sort(s), np.arange(len(s)))) / 1e3)
    ]


def reader(name):
    with tempfile.TemporaryDirectory() as folder:
        sizes = dict(celebahq=[6, 3, 4], celeba=[4, 3, 4], mufac=[16, 3, 4])
        root = portraits.write_portraits(folder, **sizes, size=16, n_jobs=1)
        f = DATASETS[name].read(root / DATASETS[name].folder)
    columns = np.asarray(f.targets, float).reshape(len(f), -1)
    return [len(f), len(f.identities), *f.identity[:8], *columns.mean(0)]


def training():
    D, _ = world('multilabel')
    recipe = TrainSpec(
        epochs=2,
        batch_size=16,
        lr=0.02,
        warmup_epochs=1,
        crop=0.5,
        clip=1.0,
        precision='fp32',
        workers=0,
    )
    net = network()
    log = fit(net, D['train'], D['val'], recipe, seed=0, quiet=True)
    return [*log.loss, *log.lr, float(predict(net, D['val']).norm())]


def step(name, task):
    "How far each tensor moves."
    (D, S), m, net = world(task), METHODS[name], network()
    torch.manual_seed(1)
    state = m.prepare(net, D['train'], D['val'], settings(name))
    torch.manual_seed(2)
    full = dict(retain=D['retain'], forget=D['forget']) if m.access == 'full' else {}
    after, before = (
        m.unlearn(net, S, state, settings(name), **full).state_dict(),
        net.state_dict(),
    )
    return [float((after[k] - before[k]).norm()) for k in before]


def measured(name):
    "A metric of random outputs."

    def outputs(seed):
        g = torch.Generator().manual_seed(seed)
        sets = ('support', 'forget', 'retain', 'val', 'test')
        y = {d: torch.randint(0, 4, (40,), generator=g) for d in sets}
        logits = {d: torch.randn(40, 4, generator=g) for d in sets}
        views = {d: torch.randn(8, 40, 4, generator=g) for d in ('forget', 'test')}
        return Outputs(logits, y, {d: np.arange(40) // 4 for d in sets}, views)

    found = METRICS[name].fn(
        outputs(0), **{n: outputs(i + 1) for i, n in enumerate(METRICS[name].needs)}
    )
    mean = lambda v: (
        float(np.mean([np.mean(x) for x in v]))
        if isinstance(v, (list, tuple))
        else float(v)
    )
    return [mean(v) for _, v in sorted(found.items())]


def units():
    "name -> (version, where to raise it, function)."
    found = {
        'drawing': (portraits.VERSION, 'VERSION in nbs/api/portraits', drawing),
        'request': (
            getattr(Request, 'version', 1),
            'Request.version in nbs/00_data_splits',
            splits,
        ),
        'training': (
            TrainSpec.version,
            'TrainSpec.version in nbs/01_vit_finetuning',
            training,
        ),
    }
    for k in ours(DATASETS):
        found[f'reader {k}'] = (
            DATASETS[k].version,
            f'the version in @dataset of read_{k}',
            lambda k=k: reader(k),
        )
    for k in ours(METHODS):
        for task in ('multilabel', 'multiclass'):
            found[f'{k}, {task}'] = (
                METHODS[k].version,
                f'the version in @method of {k}',
                lambda k=k, t=task: step(k, t),
            )
    for k in ours(METRICS):
        found[f'metric {k}'] = (
            METRICS[k].version,
            f'the version in @metric of {k}',
            lambda k=k: measured(k),
        )
    return found


def differs(then, now):
    "The largest difference by the largest number; inf if their count changed."
    if len(then) != len(now):
        return np.inf
    a, b = np.array(then, float), np.array(now, float)
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12))


TOLERANCE = 2e-3


@pytest.fixture(scope='module')
def goldens():
    return json.loads(FILE.read_text())


def test_goldens_cover_every_unit(goldens):
    assert set(goldens) == set(units()), 'run python tests/test_goldens.py'


@pytest.mark.parametrize('name', units())
def test_numbers_move_with_a_version_only(name, goldens):
    version, where, make = units()[name]
    kept = goldens[name]
    assert kept['version'] == version, (
        f'{name} is at version {version}: run python tests/test_goldens.py'
    )
    moved = differs(kept['numbers'], make())
    assert moved <= TOLERANCE, (
        f'{name} moved by {moved:.1e} of its size under version {version}. If that is '
        f'meant, raise {where} and run python tests/test_goldens.py; if not, something '
        'else broke it.'
    )


def test_a_moved_number_is_seen():
    assert (
        differs([1.0, 2.0], [1.0, 2.01]) > TOLERANCE > differs([1.0, 2.0], [1.0, 2.001])
        and differs([1.0], [1.0, 2.0]) == np.inf
    )
    net, other = network(), network()
    with torch.no_grad():
        other.head.weight.mul_(1.01)
    norms = lambda m: [float(v.norm()) for v in m.state_dict().values()]
    assert differs(norms(net), norms(net)) == 0


def write(words):
    kept = json.loads(FILE.read_text()) if words else {}
    anew = lambda k: k not in kept or any(w in k for w in words)
    text = {
        k: dict(version=v, numbers=[round(float(x), 7) for x in make()])
        if anew(k)
        else kept[k]
        for k, (v, _, make) in units().items()
    }
    FILE.write_text(json.dumps(text, indent=1) + '\n')
    print(f'{len(text)} units in {FILE}')


if __name__ == '__main__':
    write(sys.argv[1:])
