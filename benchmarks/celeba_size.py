"""CelebA at its real size, drawn once into a scratch folder: what it costs to read it,
to divide it, to look for doubles in it, and to keep a network fed with its images.

python benchmarks/celeba_size.py FOLDER [--images N] [--people N] [--out FILE]

FOLDER/celeba gets the official layout, 2.1 GB in some five minutes; what is there
already stays. Beside it comes a map of the pixels at 64 x 64, 2.5 GB more.
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from measure import memory
from PIL import Image

from oneshui.core import progress, write_atomically
from oneshui.data import Pixels, by_person, make_request, simulate_requests
from oneshui.portraits import draw_person, draw_photo, render
from oneshui.readers import ATTRIBUTES, audit_identities, read_celeba
from oneshui.vit import ImageSet

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / 'figures/published/celeba_size.json'
WIDE, HIGH = 178, 218   # an aligned photograph of CelebA, in pixels


def name(i):
    "CelebA's own file names."
    return f'{i + 1:06d}.jpg'


def photograph(who, rows, folder):
    "One drawing of a person; cut out, lit and made noisy anew for each image."
    person, rng = draw_person(0, who), np.random.default_rng(who)
    drawn = render(person, draw_photo(0, who, 0, person), HIGH).astype(np.int16)
    for i in rows:
        x = rng.integers(0, HIGH - WIDE)
        one = drawn[:, x:x + WIDE] + rng.integers(-30, 30, dtype=np.int16)
        noise = rng.integers(-9, 10, one.shape, dtype=np.int16)
        Image.fromarray((one + noise).clip(0, 255).astype(np.uint8)).save(
            folder / name(i), quality=85)


def draw(root, images, people):
    "CelebA's files: images, identity_CelebA.txt, list_attr_celeba.txt."
    rng, folder = np.random.default_rng(0), root / 'img_align_celeba'
    who = np.concatenate([np.arange(people), rng.integers(0, people, images - people)])
    marks = rng.choice([-1, 1], (images, len(ATTRIBUTES)))
    folder.mkdir(parents=True, exist_ok=True)
    order, start, _ = by_person(who)
    of = np.split(order, start[1:])
    jobs = (delayed(photograph)(k, rows, folder) for k, rows in enumerate(of)
            if not (folder / name(rows[-1])).exists())
    for _ in progress(Parallel(2, return_as='generator')(jobs), 'drawing', people): pass
    lines = (f'{name(i)} {w + 1}\n' for i, w in enumerate(who))
    write_atomically(root / 'identity_CelebA.txt', ''.join(lines))
    rows = (f'{name(i)} {" ".join(map(str, m))}\n' for i, m in enumerate(marks))
    head = f'{images}\n{" ".join(ATTRIBUTES)}\n'
    write_atomically(root / 'list_attr_celeba.txt', head + ''.join(rows))


def timed(call):
    "What it gives, and the seconds of the wall that it takes."
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def looked_at(batches, most=None):
    "How many images come by, until there are `most`."
    seen = 0
    for x, _ in batches:
        seen += len(x)
        if most and seen >= most: break
    return seen


def stream(pixels, rows, most, workers, **how):
    "Images a second of an epoch in random order, or of its first `most`."
    torch.manual_seed(0)
    batches = ImageSet(pixels, rows).batches(128, True, workers=workers, **how)
    n, t = timed(lambda: looked_at(batches, most))
    return n / t


def measured(root, size, workers):
    "Seconds of each step, images a second of each way through the data, memory."
    found, root = {}, root / 'celeba'
    def step(what, call):
        out, found[f'{what}_seconds'] = timed(call)
        found[f'{what}_peak_mb'] = memory('VmHWM')
        return out
    faces = step('read', lambda: read_celeba(root))
    r = step('divide', lambda: make_request(faces, 10, 0, (5, 10)))
    epoch = step('simulate', lambda: simulate_requests(
        faces.identity, r.train, 10, np.random.default_rng(0)))
    step('fingerprint', lambda: faces.fingerprint)
    audit = step('audit', lambda: audit_identities(faces))
    few = [(root / p).stat().st_size for p in faces.paths[::max(1, len(faces) // 1000)]]
    pixels = step('map', lambda: Pixels(faces, size, root.parent))
    found |= dict(images=len(faces), people=len(faces.identities), requests=len(epoch),
                  distinct_images=audit['distinct_images'],
                  jpeg_gb=np.mean(few) * len(faces) / 1e9,
                  map_gb=pixels.map.nbytes / 1e9, workers=workers,
                  first_epoch_images_a_second=len(faces) / found['map_seconds'],
                  map_images_a_second=stream(pixels, r.train, None, 0, augment=1))
    whole = Pixels(faces, 224, None)   # as in the paper: crops of 224, too large a map
    some = min(len(r.train), 20_000)
    found['crop_images_a_second'] = stream(whole, r.train, some, workers, augment=.08)
    found['stream_peak_mb'] = memory('VmHWM')
    return found


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('folder', type=Path)
    ap.add_argument('--images', type=int, default=202_599)
    ap.add_argument('--people', type=int, default=10_177)
    ap.add_argument('--size', type=int, default=64, help='edge of the mapped pixels')
    ap.add_argument('--workers', type=int, default=2, help='processes that decode')
    ap.add_argument('--out', type=Path, default=PUBLISHED)
    a = ap.parse_args()
    draw(a.folder / 'celeba', a.images, a.people)
    found = measured(a.folder, a.size, a.workers)
    rows = {k: float(f'{v:.6g}') for k, v in found.items()}
    write_atomically(a.out, json.dumps(rows, indent=1) + '\n')
    print(json.dumps(rows, indent=1))
