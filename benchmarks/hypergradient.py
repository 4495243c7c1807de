"""Seconds and peak memory of the exact hypergradient against the double backward it replaces, as ratios in one run each.

python benchmarks/hypergradient.py [--arch vit_base_patch16_224 --size 224 --batches 2 --batch 8 --support 5]
"""
import argparse, multiprocessing, resource, time


def world(a):
    import timm, torch
    from oneshui.metaunlearn import MetaLoss, meta_objective, outputs
    torch.manual_seed(0)
    torch.set_num_threads(2)
    options = {} if a.size == 224 else dict(embed_dim=128, depth=4, num_heads=4)
    model = timm.create_model(a.arch, img_size=a.size, num_classes=40, **options).eval()
    h = MetaLoss(40, model.embed_dim, a.support).train()
    image, label = lambda n: torch.randn(n, 3, a.size, a.size), lambda n: (torch.rand(n, 40) < .5).float()
    pairs = [[(image(a.batch), label(a.batch)) for _ in range(2)] for _ in range(a.batches)]
    def outer(θ_u):
        for (xf, yf), (xv, yv) in pairs:
            def share(xf=xf, yf=yf, xv=xv, yv=yv):
                with torch.no_grad(): v0, v1 = model(xv), outputs(model, θ_u, xv)[0]
                return meta_objective((outputs(model, θ_u, xf)[0], yf), (v0, yv), (v1, yv)) / a.batches
            yield share
    return model, h, (image(a.support), label(a.support), torch.arange(a.support)), .1, outer


def measure(name, a, out):
    import oneshui.metaunlearn as mu
    w = world(a)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    getattr(mu, name)(*w)
    t = time.perf_counter()   # the first call also imports
    for _ in range(a.repeat): getattr(mu, name)(*w)
    out.put((name, (time.perf_counter() - t) / a.repeat, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024))


if __name__ == '__main__':
    p = argparse.ArgumentParser(); p.add_argument('--arch', default='vit_base_patch16_224')
    for k, v in dict(size=64, batches=0, batch=64, support=20, repeat=5).items():
        p.add_argument('--' + k, type=int, default=v)
    a = p.parse_args(); ctx = multiprocessing.get_context('spawn')
    print('D_f batches | seconds: oracle / ours | extra memory: oracle / ours (MB)')
    for a.batches in ([a.batches] if a.batches else [1, 2, 4]):
        got = {}
        for name in ('hypergradient_oracle', 'hypergradient'):   # one process each: peak memory does not go down again
            q = ctx.Queue()
            r = ctx.Process(target=measure, args=(name, a, q))
            r.start()
            n, s, m = q.get()
            r.join()
            got[n] = (s, m)
        (s0, m0), (s1, m1) = got['hypergradient_oracle'], got['hypergradient']
        print(f'{a.batches:11d} | {s0:.2f} / {s1:.2f} = {s0 / s1:.2f}x   | {m0:.0f} / {m1:.0f} = {m0 / max(m1, 1):.2f}x')
