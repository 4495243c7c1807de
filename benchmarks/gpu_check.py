"""Five minutes on a GPU: its step time, utilisation, memory; bf16 against fp32; the two
forms of the hypergradient. One row is added to a table.

python benchmarks/gpu_check.py                 ViT-B/16 on the GPU that is found
python benchmarks/gpu_check.py --cpu           the same code, tiny, on the CPU: a test
"""
import argparse
import csv
import datetime
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

os.environ.setdefault('ONESHUI_PROGRESS', 'off')

import numpy as np
import torch
from hypergradient import shares
from measure import Product, alternate, begin_anew, finish, memory, seconds

from oneshui.core import default_device
from oneshui.data import Pixels, make_request
from oneshui.metaunlearn import MetaLoss, hypergradient, hypergradient_oracle
from oneshui.portraits import write_portraits
from oneshui.readers import read_faces
from oneshui.scale import step_flops
from oneshui.vit import (
    ImageSet, ModelSpec, TrainSpec, create_model, fit, optimiser, scheduled,
    train_epoch)

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / 'figures/published/gpu_check.csv'
MINI = dict(embed_dim=128, depth=4, num_heads=4)
FULL = dict(size=224, batch=32, steps=10, options={}, support=20, pairs=2,
            meta_batch=64, crowd=(140, 10, 30), image=64, epochs=5, product=8192)
TINY = dict(size=32, batch=4, steps=2, options=MINI, support=2, pairs=1, meta_batch=4,
            crowd=(20, 4, 6), image=32, epochs=1, product=128)


def name_of(dev):
    "What the device calls itself."
    return torch.cuda.get_device_name(dev) if dev.type == 'cuda' else 'CPU (tiny)'


def with_memory(dev, call):
    "(seconds, GB at the peak) of one call; on the CPU the peak of the process."
    if dev.type == 'cuda': torch.cuda.reset_peak_memory_stats(dev)
    else: begin_anew()
    t = seconds(call)
    if dev.type == 'cuda': return t, torch.cuda.max_memory_allocated(dev) / 1e9
    return t, memory('VmHWM') * 2**20 / 1e9


def network(a):
    "ViT-B/16 (or its tiny stand-in) with random weights: nothing is downloaded."
    spec = ModelSpec(image_size=a.size, weights='none', options=a.options)
    return create_model(spec, 40)


def images(n, a, dev):
    "Random images and attributes."
    x = torch.randn(n, 3, a.size, a.size, device=dev)
    return x, (torch.rand(n, 40, device=dev) < .5).float()


def training(a, dev, precision):
    "Some steps of fine-tuning: milliseconds each, GB, share of the rate for products."
    model, x_y = network(a), images(a.batch, a, dev)
    spec = TrainSpec(epochs=2, batch_size=a.batch, lr=1e-3, precision=precision)
    opt = optimiser(model, spec)
    schedule = scheduled(opt, spec, a.batch * a.steps)
    steps = lambda: train_epoch(model, [x_y] * a.steps, opt, schedule, spec)
    steps()
    kind = torch.bfloat16 if precision == 'bf16' else torch.float32
    product = Product(a.product, dev, kind)
    t = alternate(dict(steps=steps, product=product))
    flops = a.batch * step_flops(model, a.size)['train'] * a.steps
    rate, gb = product.flops / median(t['product']), with_memory(dev, steps)[1]
    return {f'step_ms_{precision}': 1e3 * median(t['steps']) / a.steps,
            f'step_gb_{precision}': gb, f'product_tflops_{precision}': rate / 1e12,
            f'utilisation_{precision}': flops / median(t['steps']) / rate}


def scores(a, dev):
    "Drawn portraits, the same training in bf16 and in fp32: the validation scores."
    with tempfile.TemporaryDirectory() as d:
        drawn = write_portraits(d, celebahq=(20, 2, 3), celeba=a.crowd,
                                mufac=(20, 2, 3), size=a.image)
        faces = read_faces('celeba', drawn)
        r, pixels = make_request(faces, 2, 0), Pixels(faces, a.image, d)
        D_tr, D_v = (ImageSet(pixels, rows) for rows in (r.train, r.val))
        found = {}
        for precision in ('fp32', 'bf16'):
            weights = 'mini' if a.image == 64 else 'none'
            model = create_model(ModelSpec(image_size=a.image, weights=weights,
                                           options=MINI), 40)
            spec = TrainSpec(epochs=a.epochs, lr=.1, crop=1., clip=1., workers=0,
                             precision=precision)
            log = fit(model, D_tr, D_v, spec, quiet=True)
            found[f'score_{precision}'] = log.val.max()
        pixels.map = None   # before its folder goes
    return found


def meta_step(a, dev):
    "Both forms of the hypergradient: seconds, GB, and how far they are apart."
    model = network(a)
    h = MetaLoss(40, model.embed_dim, a.support).to(dev)
    S = *images(a.support, a, dev), torch.arange(a.support, device=dev)
    pairs = []
    for _ in range(a.pairs):
        forget, val = images(a.meta_batch, a, dev), images(a.meta_batch, a, dev)
        with torch.no_grad(): pairs.append((forget, val, model(val[0])))
    step = model, h, S, .1, partial(shares, model=model, pairs=pairs)
    forms, found, grads = dict(exact=hypergradient, double=hypergradient_oracle), {}, {}
    for name, form in forms.items():
        try:
            grads[name] = form(*step)[1]
            t = [with_memory(dev, partial(form, *step)) for _ in range(5)]
        except torch.OutOfMemoryError: t = [(np.nan, np.nan)]
        finish()
        found[f'meta_seconds_{name}'], found[f'meta_gb_{name}'] = np.median(t, 0)
    flat = {k: torch.cat([g.flatten() for g in gs]) for k, gs in grads.items()}
    far = np.nan
    if len(flat) == 2:
        far = float((flat['exact'] - flat['double']).norm() / flat['double'].norm())
    return found | dict(meta_difference=far)


def check(a, dev):
    "One row of the table."
    row = dict(date=f'{datetime.date.today()}', device=name_of(dev),
               torch=torch.__version__, batch=a.batch)
    parts = [partial(training, a, dev, p) for p in ('fp32', 'bf16')]
    for part in (*parts, partial(meta_step, a, dev), partial(scores, a, dev)):
        row |= (new := part())
        for k, v in new.items(): print(f'{k:22} {v:.4g}', flush=True)
    return {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in row.items()}


def append(row, table):
    "Add a row to a CSV file; its header comes with the first one."
    table.parent.mkdir(parents=True, exist_ok=True)
    new = not table.exists()
    with table.open('a', newline='') as f:
        rows = csv.DictWriter(f, list(row), lineterminator='\n')
        if new: rows.writeheader()
        rows.writerow(row)


def main():
    p = argparse.ArgumentParser(description='Five minutes on a GPU.')
    p.add_argument('--cpu', action='store_true', help='tiny, without a GPU: a test')
    p.add_argument('--out', type=Path, help=f'default: {TABLE.relative_to(ROOT)}')
    asked, dev = p.parse_args(), default_device()
    if dev.type == 'cpu' and not asked.cpu:
        sys.exit('gpu-check: no CUDA device is visible to PyTorch '
                 f'{torch.__version__}, so nothing was measured. On a machine with a '
                 'GPU: install a CUDA build, look at nvidia-smi. To try the code on '
                 'this one: add --cpu.')
    if asked.cpu and dev.type != 'cpu':
        sys.exit('gpu-check: there is a GPU here; --cpu is for machines without one.')
    table = asked.out or (ROOT / 'build/gpu_check_cpu.csv' if asked.cpu else TABLE)
    append(check(SimpleNamespace(**(TINY if asked.cpu else FULL)), dev), table)
    print(f'one row more in {table}')


if __name__ == '__main__': main()
