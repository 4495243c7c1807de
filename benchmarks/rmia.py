"""RMIA of 5,000 images against 30,000, 8 views each: one sorted list against blocks of pairs, and the memory that either needs. Ratios, in one run."""
import resource
import time

import numpy as np

from oneshui.attacks import RMIA_GRID, rmia

megabytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
rng = np.random.default_rng(0); losses = lambda *shape: rng.gamma(2, .2, shape).astype(np.float32)
x, z = (losses(8, 5000), losses(8, 5000)), (losses(8, 30_000), losses(8, 30_000)); one = (z[0][:1], z[1][:1])

def timed(population):
    rmia(x, population); before, t = megabytes(), time.perf_counter()
    for g, a in RMIA_GRID: rmia(x, population, g, a)
    return time.perf_counter() - t, megabytes() - before

pairs, more = timed(z); sort, less = timed(one); full = 5000 * 30_000 * 8 / 1e6
print(
    f'16 settings, population in one view (sorted): {sort:.2f} s, {less:.0f} MB more\n16 settings, population in eight views (pairs): {pairs:.1f} s, {more:.0f} MB more; {pairs / sort:.0f} × the time\na matrix of all pairs and views would hold {full:.0f} MB as booleans'
)
