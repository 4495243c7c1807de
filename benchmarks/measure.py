"""What the benchmarks share: alternating clocks, the rate of a product, memory."""
import ctypes
import gc
import multiprocessing
import os
import statistics
import time
from pathlib import Path


def finish():
    "Wait for what a GPU was told to do."
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()


def clock():
    "Seconds of this process, which neighbours change little; with a GPU, of the wall."
    import torch
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def seconds(call):
    "How long one call takes."
    finish()
    start = clock()
    call()
    finish()
    return clock() - start


def alternate(forms, repeat=5):
    "name -> seconds, one for each round; a round calls every form once."
    for call in forms.values(): call()   # imports, allocates
    times = {name: [] for name in forms}
    for _ in range(repeat):
        for name, call in forms.items(): times[name].append(seconds(call))
    return times


def ratio(a, b):
    "Median over rounds of the quotient of two times."
    return statistics.median(x / y for x, y in zip(a, b))


class Product:
    "A product of two square matrices: as fast as this machine multiplies."
    def __init__(self, n=1024, device='cpu', dtype=None):
        import torch
        self.a, self.b = torch.randn(2, n, n, device=device, dtype=dtype)
        self.flops = 2 * n ** 3

    def __call__(self): return self.a @ self.b


def memory(what):
    "VmRSS or VmHWM of this process, in MB: what it has now, and its highest."
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def begin_anew():
    "Give back what is free, and let the highest be what there is now (Linux)."
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')


def _extra(world, cases, out):
    calls = [world(case) for case in cases]
    calls[0]()   # imports, and what is allocated once
    for call in calls:
        begin_anew()
        before = memory('VmRSS')
        call()
        out.put(memory('VmHWM') - before)


def extra_memory(world, cases):
    "MB that a call of `world(case)` takes, case after case, in a fresh process."
    spawn = multiprocessing.get_context('spawn')
    os.environ.setdefault('MALLOC_MMAP_THRESHOLD_', '65536')   # what is freed is free
    out = spawn.Queue()
    process = spawn.Process(target=_extra, args=(world, cases, out))
    process.start()
    found = [out.get() for _ in cases]
    process.join()
    return found
