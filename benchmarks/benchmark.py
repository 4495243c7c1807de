"""Ours against the naive form that stands in this repository, alternating in one run.

python benchmarks/benchmark.py [rows] [--tiny] [--out FILE]

Ratios of times are medians over rounds that call every form once (CPU seconds, one
thread); memory is that of a fresh process for each form. Seconds and megabytes are this
machine's and mean little elsewhere.
"""
import argparse
import cProfile
import json
import math
import os
import pstats
import shutil
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from hypergradient import world
from measure import Product, alternate, extra_memory, ratio, seconds
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from torchvision.io import ImageReadMode, decode_jpeg, read_file

from oneshui.attacks import dominated, finite_column, loss_mia
from oneshui.core import speed_up
from oneshui.data import (Pixels, RoughPixels, make_faces, portrait,
                          simulate_requests)
from oneshui.metaunlearn import hypergradient, hypergradient_oracle
from oneshui.methods import input_covariance, input_rows, projected_layers
from oneshui.metrics import (Outputs, batch_score, mean_average_precision,
                             task_loss)
from oneshui.portraits import draw_person, draw_photo, render, write_portraits
from oneshui.presets import load_preset
from oneshui.runs import RunStore, file_sha, make_runs, metric_of, run_grid
from oneshui.scale import step_flops
from oneshui.vit import (TrainSpec, forward, normalise, optimiser, predict, scheduled,
                         train_epoch)

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / 'figures/published/benchmark.json'
ARCH = 'vit_base_patch16_224'
MINI = dict(arch=ARCH, size=64, batch=64, support=20)      # S and batches: the paper's
TINY = dict(arch=ARCH, size=32, batch=4, support=2)
LARGE = dict(arch=ARCH, size=224, batch=1, support=1)      # ViT-B/16
FORMS = dict(ours=hypergradient, naive=hypergradient_oracle)


def shape(small, batches):
    "What `world` builds from."
    return SimpleNamespace(**(TINY if small else MINI), batches=batches, threads=1)


def meta_step(case):
    "One meta-step of a form with so many batches, ready to be called."
    form, small, batches = case
    return partial(FORMS[form], *world(shape(small, batches)))


def meta_flops(model, a):
    "What the formulas of chapter 03 need for one meta-step, in FLOPs."
    need = step_flops(model, a.size)
    both, forward = need['train'], need['forward']
    there_and_back = both + 3 * forward   # S: ∇M; and ż, a product forward is three
    images = a.batches * a.batch          # of D_f, and as many of D_v after the step
    return a.support * there_and_back + images * (both + forward)


def epoch_of(model, a):
    "A fine-tuning epoch of six batches of 32: (call, FLOPs)."
    n = 6 if a.size > 32 else 2
    x, y = torch.randn(32, 3, a.size, a.size), (torch.rand(32, 40) < .5).float()
    spec = TrainSpec(epochs=2, batch_size=32, lr=.01, precision='fp32', clip=1.)
    opt = optimiser(model, spec)
    schedule = scheduled(opt, spec, 32 * n)
    call = lambda: train_epoch(model, [(x, y)] * n, opt, schedule, spec)
    return call, 32 * n * step_flops(model, a.size)['train']


def limits(small, repeat):
    "A meta-step and an epoch: speed, and share of the machine's rate for products."
    a = shape(small, 1 if small else 6)
    w, product = world(a), Product(128 if small else 1024)
    learner = world(a)[0]
    epoch, epoch_flops = epoch_of(learner, a)
    steps = {name: partial(form, *w) for name, form in FORMS.items()}
    t = alternate(steps | dict(product=product, epoch=epoch), repeat)
    flop = ratio(t['product'], [product.flops] * repeat)   # seconds of one
    reached = lambda flops, name: flops / product.flops * ratio(t['product'], t[name])
    return dict(meta_step_speedup=ratio(t['naive'], t['ours']),
                meta_step_seconds=median(t['ours']), matmul_gflops=1e-9 / flop,
                limit_fraction_meta=reached(meta_flops(w[0], a), 'ours'),
                limit_fraction_train=reached(epoch_flops, 'epoch'))


def memory(small, repeat):
    "Extra megabytes of one meta-step against the number of batches."
    few, some, many = (1, 2, 3) if small else (1, 6, 16)
    def megabytes(form, *batches):
        cases = [(form, small, n) for n in batches]
        return dict(zip(batches, extra_memory(meta_step, cases)))
    ours, naive = megabytes('ours', few, some, many), megabytes('naive', few, some)
    found = {f'meta_step_mb_{n}': m for n, m in ours.items()}
    found |= {f'naive_mb_{n}': m for n, m in naive.items()}
    return found | dict(meta_step_memory_ratio=naive[some] / ours[some],
                        memory_growth_1_16=ours[many] / ours[few])


def large(small, repeat):
    "A meta-step of ViT-B/16: one image of each kind."
    w = world(SimpleNamespace(**(TINY if small else LARGE), batches=1, threads=1))
    t = alternate({k: partial(form, *w) for k, form in FORMS.items()}, repeat)
    return dict(meta_step_vit_b_speedup=ratio(t['naive'], t['ours']))


def attack(small, repeat):
    "RMIA's score: a sorted population against all pairs, the same numbers."
    rng, n, m = np.random.default_rng(0), *((50, 300) if small else (5000, 30_000))
    x, z = rng.normal(size=(8, n)), rng.normal(size=(1, m))
    forms = dict(ours=partial(dominated, x, z, 0.),
                 naive=partial(dominated, x, np.repeat(z, 8, 0), 0.))
    assert np.array_equal(forms['ours'](), forms['naive']())
    t = alternate(forms, repeat)
    return dict(rmia_speedup=ratio(t['naive'], t['ours']))


class Noise:
    "Images that a loop of batches can read."
    def __init__(self, n, size, classes=40):
        self.x = torch.randn(n, 3, size, size)
        self.y = (torch.rand(n, classes) < .5).float()

    def batches(self, batch_size, *how, **more):
        return zip(self.x.split(batch_size), self.y.split(batch_size))


def pgu(small, repeat):
    "PGU's preparation: all layers in one pass, against chapter 02's layer by layer."
    model = world(shape(small, 1))[0]
    images = Noise(8 if small else 512, 32 if small else 64)
    known = dict(torch=torch, input_rows=input_rows, projected_layers=projected_layers)
    naive = from_chapter('02_baselines.ipynb', 'naive_covariance', **known)
    forms = dict(ours=partial(input_covariance, model, images),
                 naive=partial(naive, model, images))
    C, expected = (f() for f in forms.values())
    near = partial(torch.allclose, rtol=1e-3, atol=1e-2)
    assert all(near(C[k], v) for k, v in expected.items())
    t = alternate(forms, repeat)
    return dict(pgu_speedup=ratio(t['naive'], t['ours']))


def forest_by_forest(retain, val, forget, test):
    "The loss attack's grid as it reads: six forests, each grown from nothing."
    X, asked = (np.concatenate([*map(finite_column, two)])
                for two in ((retain, val), (forget, test)))
    member = np.repeat([1, 0], [len(retain), len(val)])
    for criterion in ('gini', 'entropy'):
        for trees in (20, 50, 100):
            rf = RandomForestClassifier(trees, criterion=criterion, random_state=0,
                                        oob_score=True).fit(X, member)
            yield rf.predict_proba(asked)[:, 1]


def evaluation(small, repeat):
    "A run judged: one pass and three forests, against set by set and six forests."
    model = world(shape(small, 1))[0]
    sizes = dict(support=2, forget=100, retain=1000, val=200, test=300)
    edges = np.cumsum([0, *sizes.values()]) // (10 if small else 1)
    every = Noise(edges[-1], 32 if small else 64)
    parts = {d: Noise(0, 1) for d in sizes}
    for d, a, b in zip(sizes, edges, edges[1:]):
        parts[d].x, parts[d].y = every.x[a:b], every.y[a:b]
    parts['support'] = parts['forget']   # whose images are among them
    def judged(logits, attack):
        run = Outputs(logits, {d: p.y for d, p in parts.items()}, {})
        found = attack(*(run.loss(d) for d in ('retain', 'val', 'forget', 'test')))
        return run.scores, found if isinstance(found, dict) else list(found)
    def ours():
        z = predict(model, every)
        by_set = {d: z[a:b] for d, a, b in zip(sizes, edges, edges[1:])}
        return judged(by_set | dict(support=by_set['forget']), loss_mia)
    def naive():
        by_set = {d: predict(model, p) for d, p in parts.items()}
        return judged(by_set, forest_by_forest)
    (a, _), (b, _) = ours(), naive()
    assert all(math.isclose(a[d], b[d], rel_tol=1e-3) for d in a)
    t = alternate(dict(ours=ours, naive=naive), repeat)
    return dict(eval_speedup=ratio(t['naive'], t['ours']))


@contextmanager
def all_runs(small):
    "One request put to every method, in a store of its own: (folder, call)."
    p = load_preset('smoke' if small else 'mini').model_copy(update=dict(requests=1))
    data = write_portraits(ROOT / 'data', **p.portraits)
    methods = ['pretrain', 'neggrad'] if small else None   # None: all
    with TemporaryDirectory() as folder:
        store = RunStore(folder, data)
        yield Path(folder), partial(run_grid, store, p, ['mufac'], p.seeds[:1],
                                    methods, 1)


def reproduction(small, repeat):
    "CPU seconds of a run, all told, and what the seconds of the wall went to."
    found, start = [], time.perf_counter()
    with all_runs(small) as (folder, call):
        taken = seconds(lambda: found.append(call()))
        runs = len(list(folder.glob('*/manifest.json')))
    whole = time.perf_counter() - start
    share = {f'reproduce_share_{k}': v / whole for k, v in spent(*found).items()}
    return share | dict(reproduce_seconds_per_run=taken / runs)


def spent(t):
    "Seconds of training, preparing and unlearning in a tidy table of results."
    t = t.drop_duplicates(['dataset', 'seed', 'method', 'metric', 'value'])
    of = lambda metric, which: t.value[(t.metric == metric) & which].sum()
    trained = t.method.isin(['pretrain', 'retrain', 'retrain_again'])
    return dict(training=of('seconds', trained), unlearning=of('seconds', ~trained),
                preparing=of('prepare_seconds', ~trained))


def profiled(small, repeat):
    "The share of a reproduction's CPU seconds inside PyTorch's own operations."
    with all_runs(small) as (_, call):
        watch = cProfile.Profile(time.process_time)
        watch.runcall(call)
    own = {k: v[2] for k, v in pstats.Stats(watch).stats.items()}   # without callees
    inside = sum(t for (file, _, name), t in own.items()
                 if file == '~' and ('torch._C' in name or 'method torch.' in name))
    return dict(reproduce_share_operations=inside / sum(own.values()))


def copied(store, s, lr):
    "A finished run's folder again, as that of another learning rate."
    other = s.model_copy(update=dict(hyper=s.hyper | dict(lr=lr)))
    there, manifest = store.folder(other), dict(store.get(s).manifest)
    there.mkdir()
    for f in store.folder(s).glob('*.safetensors'): os.link(f, there / f.name)
    (there / 'spec.json').write_text(other.model_dump_json(indent=1))
    files = manifest['files'] | {'spec.json': file_sha(there / 'spec.json')}
    (there / 'manifest.json').write_text(json.dumps(manifest | dict(files=files)))
    return other


def store_of_many(small, repeat):
    "A store of 10,000 small runs: seconds to find one, and to read a table of all."
    p, data = load_preset('smoke'), ROOT / 'data'
    data = write_portraits(data, **p.portraits)
    with TemporaryDirectory() as folder:
        store = RunStore(folder, data)
        one = store.spec(p, 'mufac', 2, 0, 'neggrad')
        store.metrics(one)
        n = 20 if small else 10_000
        runs = [copied(store, one, .01 + 1e-6 * k) for k in range(n)]
        metric_of(store, runs, 'tow')   # found out, once
        fresh = RunStore(folder, data)
        fresh.faces('mufac')
        found = seconds(lambda: fresh.get(runs[-1]))
        read = seconds(lambda: pd.DataFrame(metric_of(fresh, runs, 'tow')))
    return dict(store_find_seconds=found, store_table_seconds=read)


def trainings(store, preset, n):
    "Wall seconds of so many trainings, two at a time."
    runs = [store.spec(preset, 'mufac', 2, k, 'pretrain') for k in range(n)]
    start = time.perf_counter()
    make_runs(store, runs, judge=False)
    return time.perf_counter() - start


def engines(small, repeat):
    "Two workers of a Dask cluster against joblib's own two, on the same trainings."
    from distributed import LocalCluster
    p, n = load_preset('smoke'), 2 if small else 8
    p = p.model_copy(update=dict(train=p.train.model_copy(update=dict(
        epochs=1 if small else 40))))
    data = write_portraits(ROOT / 'data', **p.portraits)
    def taken(cluster):
        with TemporaryDirectory() as folder:
            store = RunStore(folder, data)
            store.cluster = cluster
            return trainings(store, p, n)
    times = dict(joblib=[], dask=[])
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=':0') as c:
        address = dict(joblib=None, dask=c.scheduler_address)
        for cluster in address.values(): taken(cluster)   # workers start, import
        for _ in range(repeat):
            for k, cluster in address.items(): times[k].append(taken(cluster))
    return dict(dask_speed_of_joblib=ratio(times['joblib'], times['dask']))


def from_chapter(notebook, name, **known):
    "A function that a chapter defines and does not export; `known`: what it calls."
    cells = json.loads((ROOT / 'nbs' / notebook).read_text())['cells']
    source, = (s for s in (''.join(c['source']) for c in cells)
               if s.startswith(f'def {name}('))
    exec(source.split('\n\n')[0], known)
    return known[name]


def episodes(small, repeat):
    "An epoch of simulated requests: index arithmetic against chapter 00's loops."
    people, images = (30, 200) if small else (10_177, 202_599)
    who = np.random.default_rng(0).integers(0, people, images)
    naive, rows = from_chapter('00_data_splits.ipynb', 'naive_epoch'), np.arange(images)
    forms = {f.__name__: f for f in (simulate_requests, naive)}
    calls = {k: lambda f=f: f(who, rows, 10, np.random.default_rng(0))
             for k, f in forms.items()}
    first = [[list(map(int, d)) for d in call()[0]] for call in calls.values()]
    assert first[0] == first[1]
    t = alternate(calls, repeat)
    return dict(episodes_speedup=ratio(t['naive_epoch'], t['simulate_requests']))


def scores(small, repeat):
    "The score of a batch, which scales the losses in A: at once against torchmetrics."
    g, n = torch.Generator().manual_seed(0), 8 if small else 64
    logits = torch.randn(n, 40, generator=g)
    y = (torch.rand(n, 40, generator=g) < .3).float()
    forms = dict(ours=partial(batch_score, logits, y),
                 naive=partial(mean_average_precision, logits, y))
    assert math.isclose(100 * forms['ours'](), forms['naive'](), rel_tol=1e-5)
    t = alternate(forms, 5 * repeat)   # short ones
    return dict(batch_score_speedup=ratio(t['naive'], t['ours']))


def photographs(folder, n, edge):
    "A folder of n noisy JPEGs of one drawing, as a table."
    rng, names = np.random.default_rng(0), [f'{i}.jpg' for i in range(n)]
    person = draw_person(0, 0)
    face = render(person, draw_photo(0, 0, 0, person), edge)
    for name in names:
        noisy = (face + rng.normal(0, 6, face.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / name, quality=92)
    return make_faces('large', folder, names, names, np.zeros((n, 2)), 'multilabel',
                      ['a', 'b'])


def loader(small, repeat):
    "An epoch over large JPEGs: decoded once, against decode, normalise, resize."
    n, edge, size = (6, 64, 16) if small else (100, 1024, 64)
    rows = np.array_split(np.arange(n), max(1, n // 25))
    with TemporaryDirectory() as folder:
        faces = photographs(Path(folder), n, edge)
        naive = RoughPixels(faces, size)
        def first():
            for f in Path(folder).glob('*.npy'): f.unlink()
            return [Pixels(faces, size, folder).batch(r) for r in rows]
        mapped = Pixels(faces, size, folder)
        again = lambda: [normalise(mapped.batch(r)) for r in rows]
        theirs = lambda: [naive.batch(r) for r in rows]
        t = alternate(dict(first=first, again=again, naive=theirs), repeat)
    return dict(loader_speedup=ratio(t['naive'], t['again']),
                loader_first_epoch_speedup=ratio(t['naive'], t['first']))


def decoders(small, repeat):
    "Pillow, which leaves out what a small picture does not need, against torchvision."
    def whole(path):
        "All of its pixels, by torchvision."
        image = decode_jpeg(read_file(str(path)), ImageReadMode.RGB)
        return image.permute(1, 2, 0).numpy()
    def theirs(path, size):
        return Image.fromarray(whole(path)).resize((size, size), Image.BILINEAR)
    found = {}
    edges = dict(small=32, large=64) if small else dict(small=200, large=1024)
    for what, edge in edges.items():
        n, size = (4, 16) if small else (20, 64)
        with TemporaryDirectory() as folder:
            faces = photographs(Path(folder), n, edge)
            names = [Path(folder) / p for p in faces.paths]
            same = np.array_equal(portrait(faces, 0), whole(names[0]))
            assert same, 'at full size'
            t = alternate(dict(
                pillow=lambda: [portrait(faces, i, size) for i in range(n)],
                torchvision=lambda: [theirs(p, size) for p in names]), repeat)
        found[f'decoder_{what}_speedup'] = ratio(t['torchvision'], t['pillow'])
    return found


def compiled(small, repeat):
    "A training step through torch.compile, after it was compiled."
    if small or not shutil.which('g++'): return {}   # it needs a compiler
    def step_of(compile):
        model = world(shape(small, 1))[0]
        run, opt = speed_up(model, compile), torch.optim.SGD(model.parameters(), 1e-3)
        x, y = torch.randn(32, 3, 64, 64), (torch.rand(32, 40) < .5).float()
        def step():
            opt.zero_grad()
            task_loss(forward(run, x), y).backward()
            opt.step()
        return lambda: [step() for _ in range(5)]
    t = alternate(dict(plain=step_of(False), ours=step_of(True)), repeat)
    return dict(compile_speedup=ratio(t['plain'], t['ours']))


ROWS = dict(limits=limits, memory=memory, attack=attack, episodes=episodes,
            scores=scores, loader=loader, large=large, pgu=pgu, evaluation=evaluation,
            reproduction=reproduction, profiled=profiled, store=store_of_many,
            engines=engines, decoders=decoders, compiled=compiled)


def measured(names, small=False, repeat=5):
    "name -> number, row after row."
    torch.set_num_threads(1)
    for name in names:
        for k, v in ROWS[name](small, repeat).items():
            print(f'{k:26} {v:.3g}', flush=True)
            yield k, float(f'{v:.4g}')


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('rows', nargs='*', default=list(ROWS), help='default: all')
    p.add_argument('--out', type=Path, default=PUBLISHED, help='a JSON file')
    p.add_argument('--tiny', action='store_true', help='seconds, for tests')
    p.add_argument('--repeat', type=int, default=5)
    a = p.parse_args()
    kept = json.loads(a.out.read_text()) if a.out.exists() else {}
    for k, v in measured(a.rows, a.tiny, a.repeat):
        kept[k] = v   # other rows stay
        a.out.write_text(json.dumps(kept, indent=1) + '\n')


if __name__ == '__main__': main()
