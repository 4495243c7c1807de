"""RMIA of 5,000 images against 30,000, 8 views each: sorted against all pairs.

Time and memory of either, as ratios in one run.
"""

import resource
import time

import numpy as np

from oneshui.attacks import RMIA_GRID, rmia

megabytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
rng = np.random.default_rng(0)
losses = lambda *shape: rng.gamma(2, 0.2, shape).astype(np.float32)
questioned = losses(8, 5000), losses(8, 5000)
eight_views = losses(8, 30_000), losses(8, 30_000)
one_view = tuple(z[:1] for z in eight_views)


def timed(population):
    "Seconds and further megabytes of all 16 settings."
    rmia(questioned, population)  # the first call imports
    before, t = megabytes(), time.perf_counter()
    for g, a in RMIA_GRID:
        rmia(questioned, population, g, a)
    return time.perf_counter() - t, megabytes() - before


if __name__ == '__main__':
    (pairs, more), (sort, less) = timed(eight_views), timed(one_view)
    print(f'population in one view (sorted): {sort:.2f} s, {less:.0f} MB more')
    print(
        f'population in eight views (pairs): {pairs:.1f} s, {more:.0f} MB more; '
        f'{pairs / sort:.0f} times as long'
    )
    print(f'a matrix of all pairs and views: {5000 * 30_000 * 8 / 1e6:.0f} MB')
