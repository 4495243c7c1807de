"""Several processes on one training give what one process gives."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from oneshui.core import StoreError
from oneshui.methods import METHODS
from oneshui.presets import load_preset
from oneshui.ranks import first, launch, part_of, together
from oneshui.runs import RunStore
from oneshui.vit import create_model, fit, predict, support_set

HERE = Path(__file__).parent
EACH = ('metaunlearn', 'metastep')   # prepared, on both sides of A


def alike(a, b, within=1e-5):
    "Relative distance of two sets of tensors."
    assert a.keys() == b.keys()
    whole = lambda t: torch.cat([t[k].flatten().double() for k in sorted(t)])
    return (whole(a) - whole(b)).norm() <= within * whole(a).norm()


def everything(root, data):
    "What comes of all that may be shared: training, SCRUB, Bad Teacher, meta-training."
    store, P = RunStore(root, data), load_preset('smoke')
    s = store.spec(P, 'celeba', 2, 0, 'pretrain')
    D = store.sets(s)
    fresh = lambda: create_model(s.model, len(store.faces('celeba').classes), 0)
    model, made = fresh(), {}
    keep = lambda name, t: made.update({f'{name} {k}': v.detach().clone().contiguous()
                                        for k, v in t.items()})
    fit(model, D['train'], D['val'], s.train, 0, quiet=True)
    keep('fit', model.state_dict())
    keep('predict', dict(logits=predict(model, D['test'], 5)))
    S = support_set(D['val'].pixels, store.request(s).support)
    for name in ('scrub', 'bad_teacher'):
        torch.manual_seed(1)
        net = fresh()
        net.load_state_dict(model.state_dict())
        hp = METHODS[name].check(P.hyper('celeba', name, 2))
        METHODS[name].unlearn(net, S, {}, hp, retain=D['retain'], forget=D['forget'])
        keep(name, net.state_dict())
    for name in EACH:
        torch.manual_seed(2)
        hp = METHODS[name].check(dict(simulated_size=2) | P.hyper('celeba', name, 2))
        state = METHODS[name].prepare(model, D['train'], D['val'], hp)
        # eigenvectors have no sign
        keep(name, {k: v for k, v in state.items()
                    if v.is_floating_point() and not k.startswith('H.U')})
    return made


def on_a_rank():
    root, data, out = sys.argv[1:4]
    assert together().num_processes == 2
    made = everything(Path(root), Path(data))
    if first(): save_file(made, out)


@pytest.fixture
def found_by_launch(monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(map(str, (HERE, HERE.parent))))


def test_parts_go_round():
    x = torch.arange(7)
    for ranks in (1, 2, 3, 8):
        parts = [part_of(x, k, ranks) for k in range(ranks)]
        assert torch.equal(torch.cat(parts)[:7], x) and len({*map(len, parts)}) == 1


def test_two_ranks_give_what_one_gives(found_by_launch, data_dir, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: alone = everything(tmp_path / 'runs', data_dir)
    finally: torch.set_num_threads(threads)
    out = tmp_path / 'shared.safetensors'
    launch(2, 'test_ranks:on_a_rank', tmp_path / 'runs', data_dir, out,
           log=tmp_path / 'log')
    together = load_file(out)
    for name in ('fit', 'predict', 'scrub', 'bad_teacher', *EACH):
        mine = lambda t: {k: v for k, v in t.items() if k.split()[0] == name}
        assert mine(alone) and alike(mine(alone), mine(together)), name


def test_killed_on_two_ranks_a_training_goes_on(smoke, data_dir, tmp_path):
    "The launcher is killed, its ranks end, the next process takes over from the epoch."
    long = smoke.model_copy(update=dict(
        train=smoke.train.model_copy(update=dict(epochs=10))))
    here, there = (RunStore(tmp_path / k, data_dir) for k in ('here', 'there'))
    there.ranks = 2
    s = here.spec(long, 'mufac', 2, 0, 'retrain')
    code = ('import sys; from oneshui.runs import RunSpec, RunStore\n'
            'store = RunStore(*sys.argv[1:3]); store.ranks = 2\n'
            'store.get(RunSpec.model_validate_json(sys.argv[3]))')
    job = subprocess.Popen([sys.executable, '-c', code, there.root, data_dir,
                            s.model_dump_json()])
    notes = there.root / f'.{s.name}.part/training'
    while not (notes / 'state.json').exists():
        assert job.poll() is None
        time.sleep(.01)
    job.kill()
    job.wait()
    said = ['']
    while (notes / 'state.json').read_text() != said[-1]:   # until nobody writes
        said.append((notes / 'state.json').read_text())
        time.sleep(2)
    assert not there.has(s) and len(json.loads(said[-1])['rows']) < 10
    weights = lambda store: store.get(s).model().state_dict()
    assert alike(weights(here), weights(there))
    assert {f.name for f in here.folder(s).iterdir()} == {
        f.name for f in there.folder(s).iterdir()}


def test_what_a_rank_dies_of_is_said(smoke, data_dir, tmp_path):
    there = RunStore(tmp_path, data_dir)
    there.ranks = 2
    wild = smoke.model_copy(update=dict(
        train=smoke.train.model_copy(update=dict(lr=1e9, clip=None))))
    with pytest.raises(StoreError, match='2 ranks failed.*training loss is'):
        there.get(there.spec(wild, 'mufac', 2, 0, 'retrain'))
