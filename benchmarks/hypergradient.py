"""Seconds and peak memory of the exact hypergradient against double backward.

python benchmarks/hypergradient.py
    [--arch vit_base_patch16_224 --size 224 --batches 2 --batch 8 --support 5]
"""
import argparse
import multiprocessing
import resource
import time
from functools import partial

FORMS = 'hypergradient_oracle', 'hypergradient'
SETTINGS = dict(size=64, batches=0, batch=64, support=20, repeat=5, threads=2)


def shares(θ_u, model, pairs):
    "A, one pair of batches after the other."
    import torch
    from oneshui.metaunlearn import meta_objective, outputs
    for (xf, yf), (xv, yv), before in pairs:
        with torch.no_grad(): after = outputs(model, θ_u, xv)[0]
        sides = (outputs(model, θ_u, xf)[0], yf), (before, yv), (after, yv)
        yield meta_objective(*sides) / len(pairs)


def world(a):
    "Model, h_φ, S, η and outer, of random images."
    import timm
    import torch
    from oneshui.metaunlearn import MetaLoss
    torch.manual_seed(0)
    torch.set_num_threads(a.threads)
    small = {} if a.size == 224 else dict(embed_dim=128, depth=4, num_heads=4)
    model = timm.create_model(a.arch, img_size=a.size, num_classes=40, **small).eval()
    def images(n):
        return torch.randn(n, 3, a.size, a.size), (torch.rand(n, 40) < .5).float()
    h = MetaLoss(40, model.embed_dim, a.support)
    S = *images(a.support), torch.arange(a.support)
    def pair():
        forget, val = images(a.batch), images(a.batch)
        with torch.no_grad(): return forget, val, model(val[0])   # θ does not change
    pairs = [pair() for _ in range(a.batches)]
    return model, h, S, .1, partial(shares, model=model, pairs=pairs)


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024   # MB


def measure(name, a, out):
    "Seconds a call and extra memory, in a process of its own: a peak does not go down."
    import oneshui.metaunlearn
    form, w = getattr(oneshui.metaunlearn, name), world(a)
    before = peak()
    form(*w)   # also imports
    start = time.perf_counter()
    for _ in range(a.repeat): form(*w)
    out.put(((time.perf_counter() - start) / a.repeat, peak() - before))


def measured(name, a):
    spawn = multiprocessing.get_context('spawn')
    out = spawn.Queue()
    process = spawn.Process(target=measure, args=(name, a, out))
    process.start()
    found = out.get()
    process.join()
    return found


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--arch', default='vit_base_patch16_224')
    for k, v in SETTINGS.items(): p.add_argument(f'--{k}', type=int, default=v)
    a = p.parse_args()
    print('D_f batches | seconds: naive / exact | extra memory: naive / exact (MB)')
    for a.batches in [a.batches] if a.batches else [1, 2, 4]:
        (s, m), (s1, m1) = (measured(name, a) for name in FORMS)
        print(f'{a.batches:11d} | {s:.2f} / {s1:.2f} = {s / s1:.2f}x   '
              f'| {m:.0f} / {m1:.0f} = {m / max(m1, 1):.2f}x')
