"""The benchmarks run, in tiny form; what they publish is what chapter 04 reads."""
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))
PUBLISHED = ROOT / 'figures/published/benchmark.json'


def python(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT,
                          capture_output=True, text=True)


def test_rows_are_ratios_of_what_was_measured(monkeypatch):
    import benchmark
    from measure import alternate
    taken = dict(ours=lambda n: 2., naive=lambda n: 5. * n)
    monkeypatch.setattr(benchmark, 'extra_memory', lambda world, cases: [
        taken[form](n) for form, _, n in cases])
    threads = torch.get_num_threads()
    rows = [r for r in benchmark.ROWS if r != 'engines']   # test_cluster has those
    try: found = dict(benchmark.measured(rows, small=True, repeat=1))
    finally: torch.set_num_threads(threads)
    assert found['meta_step_memory_ratio'] == 5. and found['memory_growth_1_16'] == 1.
    shares = {k: v for k, v in found.items() if '_share_' in k}
    assert all(0 <= v <= 1 for v in shares.values()) and len(shares) == 4
    assert all(v > 0 for k, v in found.items() if k not in shares)
    published = {k for k in json.loads(PUBLISHED.read_text()) if '_mb_' not in k}
    known = {*found, 'dask_speed_of_joblib', 'compile_speedup'}
    assert published <= known, 'no number is published that nobody can measure'
    calls = []
    alternate({k: lambda k=k: calls.append(k) for k in 'ab'}, repeat=3)
    assert ''.join(calls) == 'ab' * 4


class Products(TorchDispatchMode):
    "Counts FLOPs; FlopCounterMode follows modules, which autograd.grad stops."
    total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out, kwargs = op(*args, **kwargs or {}), kwargs or {}
        count = flop_registry.get(op.overloadpacket)
        if count: self.total += count(*args, **kwargs, out_val=out)
        return out


def test_flops_of_a_meta_step_are_those_that_are_computed():
    import benchmark
    from hypergradient import world
    a = benchmark.shape(True, 2)
    w = world(a)
    with Products() as counted: benchmark.hypergradient(*w)
    assert abs(benchmark.meta_flops(w[0], a) / counted.total - 1) < .15


def test_a_data_set_of_celebas_layout_is_drawn_read_and_streamed(tmp_path):
    out = tmp_path / 'found.json'
    some = ('--images', 120, '--people', 20, '--size', 16, '--workers', 0)
    r = python('benchmarks/celeba_size.py', tmp_path, *some, '--out', out)
    assert r.returncode == 0, r.stderr
    found = json.loads(out.read_text())
    assert found['images'] == found['distinct_images'] == 120 and found['people'] == 20
    assert all(v > 0 for k, v in found.items() if k != 'workers')
    known = json.loads(PUBLISHED.with_name('celeba_size.json').read_text())
    assert known.keys() == found.keys() and known['images'] == 202_599


def test_memory_is_that_of_a_fresh_process():
    import measure
    few, many = measure.extra_memory(filled, [100, 300])
    assert 95 < few < 115 and 295 < many < 315


def filled(megabytes):
    "A call that takes so much."
    return partial(touched, megabytes)


def touched(megabytes): return bytes([1]) * (megabytes * 2**20)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_so():
    r = python('benchmarks/gpu_check.py')
    assert r.returncode == 1 and 'nothing was measured' in r.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_the_check_of_a_gpu_runs_on_a_cpu(tmp_path):
    r = python('benchmarks/gpu_check.py', '--cpu', '--out', tmp_path / 't.csv')
    assert r.returncode == 0, r.stderr
    t = pd.read_csv(tmp_path / 't.csv')
    assert len(t) == 1 and t.notna().all(axis=None) and (t.meta_difference < 1e-3).all()
    assert (t.select_dtypes('number') >= 0).all(axis=None)
    import gpu_check
    gpu_check.append(t.iloc[0].to_dict(), tmp_path / 't.csv')
    again = pd.read_csv(tmp_path / 't.csv')
    assert len(again) == 2 and list(again.columns) == list(t.columns)
