"""Runs on a Dask cluster: the same store, whoever dies on the way."""
import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest

pytest.importorskip('distributed')
from distributed import LocalCluster
from joblib import Parallel, delayed

from oneshui.cluster import (
    connect, this_worker, timeline, who_did_what, working_on)
from oneshui.core import PresetError, StoreError
from oneshui.presets import check_parameters
from oneshui.runs import (
    RunStore, make_runs, measure, metric_of, open_store, question)


@pytest.fixture(scope='module')
def two():
    "Two workers of one thread, each a process."
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=':0') as c:
        yield c


def stored(store):
    "run -> hashes of its files, fingerprint of its code."
    kept = {f.parent.name: json.loads(f.read_text())
            for f in store.root.glob('*/manifest.json')}
    return {name: (m['files'], m['code']) for name, m in kept.items()}


def asked(store, preset, *methods):
    return [store.spec(preset, 'mufac', 2, 0, m) for m in methods]


def on(cluster, root, data_dir):
    store = RunStore(root, data_dir)
    store.cluster = cluster.scheduler_address
    return store


def test_the_store_is_that_of_joblib(two, smoke, tmp_path, data_dir):
    rows = 'pretrain', 'retrain', 'neggrad', 'ssd'
    here = RunStore(tmp_path / 'here', data_dir)   # shared is made at any thread count
    there = on(two, tmp_path / 'there', data_dir)
    make_runs(there, asked(there, smoke, *rows), judge=False)
    make_runs(here, asked(here, smoke, *rows), n_jobs=1, judge=False)
    made = stored(there)
    assert len(made) == 5 and made == stored(here)
    t = who_did_what(there.cluster)
    assert sorted(w.split()[1] for w in t.what) == sorted(made), 'each made once'
    assert len(set(t.worker)) == 2 and (t.end > t.begin).all()
    bars = timeline(t, lambda what: what.split()[0])
    assert len(bars.patches) == len(t) and len(bars.get_yticks()) == 2
    tow, = metric_of(there, asked(there, smoke, 'neggrad'), 'tow')
    assert tow == here.metric(asked(here, smoke, 'neggrad')[0], 'tow')


@question()
def where(store, s): return str(store.faces(s.dataset).root)


def test_a_worker_reads_its_own_copy(two, smoke, tmp_path, data_dir):
    store, own = on(two, tmp_path / 'runs', data_dir), tmp_path / 'own'
    shutil.copytree(data_dir, own)
    jobs = [(s, {}) for s in asked(store, smoke, 'pretrain')]

    def move_to(folder):
        from oneshui import runs
        os.environ['ONESHUI_DATA'] = folder
        vars(runs)['_faces_at'].cache_clear()   # as a new worker

    with connect(store.cluster) as client:
        assert measure(store, where, jobs)[0].startswith(str(data_dir))
        shutil.rmtree(store.root / 'results')
        client.run(move_to, str(own))
        try:
            assert measure(store, where, jobs)[0].startswith(str(own))
            next(own.glob('mufac/*/*.jpg')).write_bytes(b'other pixels')
            client.run(move_to, str(own))
            with pytest.raises(StoreError, match='Copy it again'):
                make_runs(store, asked(store, smoke, 'pretrain'))
        finally: client.run(move_to, str(data_dir))


def killing(store, name, dead):
    "A thread that kills the worker of a training, once that has saved an epoch."
    half_way = store.root / f'.{name}.part/training/state.json'

    def kill():
        with connect(store.cluster) as client:
            found = client.run(lambda dask_worker: (str(dask_worker.name), os.getpid()))
            while not half_way.exists(): time.sleep(.01)
            begun = [e['name'] for _, e in client.get_events('oneshui')
                     if e['what'] == f'training {name}' and e['sign'] == 'begin']
        os.kill(dict(found.values())[begun[0]], signal.SIGKILL)
        dead.extend(begun)
    return threading.Thread(target=kill)


def test_a_killed_worker_loses_nothing(two, smoke, tmp_path, data_dir):
    long = smoke.model_copy(update=dict(
        train=smoke.train.model_copy(update=dict(epochs=12))))
    there = on(two, tmp_path / 'there', data_dir)
    here = RunStore(tmp_path / 'here', data_dir)
    s, = asked(there, long, 'retrain')
    name, dead = there.folder(s).name, []
    killer = killing(there, name, dead)
    killer.start()
    make_runs(there, [s], judge=False)
    killer.join()
    make_runs(here, [s], n_jobs=1, judge=False)
    assert stored(there) == stored(here), 'resumed elsewhere, the same weights'
    t = who_did_what(there.cluster)
    t = t[t.what == f'training {name}']
    assert list(t.worker)[:1] == dead and list(t.end.isna()) == [True, False]
    assert not list(there.root.glob('.*.part'))


@question()
def deadly(store, s): os.kill(os.getpid(), signal.SIGKILL)


def test_what_kills_every_worker_is_given_up(two, smoke, tmp_path, data_dir):
    store = on(two, tmp_path / 'runs', data_dir)
    jobs = [(s, {}) for s in asked(store, smoke, 'pretrain')]
    two.scheduler.allowed_failures = 0   # deaths; Dask's own patience is 3
    with pytest.raises(StoreError, match='answers are missing'):
        measure(store, deadly, jobs)


def on_a_worker(): return this_worker() is not None


def test_a_single_worker_does_the_work(tmp_path):
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False,
                      dashboard_address=':0') as c:
        with working_on(c.scheduler_address, tmp_path) as how:
            assert all(Parallel(1, **how)(delayed(on_a_worker)() for _ in range(3)))
    with working_on(None, tmp_path) as how:
        assert not any(Parallel(1, **how)(delayed(on_a_worker)() for _ in range(3)))


def test_what_is_no_cluster_is_said_at_once(tmp_path, monkeypatch):
    def refused(cluster, match):
        given = dict(preset='smoke', cluster=cluster, data_dir=str(tmp_path),
                     store=str(tmp_path / 'runs'), n_jobs=1)
        with pytest.raises(PresetError, match=match):
            open_store(*check_parameters(given))
    refused('tcp://127.0.0.1:9', 'no Dask scheduler answers')
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False,
                      dashboard_address=':0') as c:
        refused(c.scheduler_address, '--nthreads 1')
    monkeypatch.setitem(sys.modules, 'distributed', None)
    refused('tcp://127.0.0.1:8786', 'pip install "oneshui.cluster."')
