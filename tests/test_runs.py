"""The run store: nothing is lost, nothing is made twice, nothing can be read that was not written."""
import json, multiprocessing, os, subprocess, sys, textwrap

import pytest
import torch
from safetensors.torch import load_file

from oneshui.baselines import METHODS, get_method, method
from oneshui.data import FacesError
from oneshui.presets import load_preset
from oneshui.runs import RunStore, check_parameters, run_grid


@pytest.fixture
def store(tmp_path, data_dir): return RunStore(tmp_path / 'runs', data_dir)


def test_a_run_is_made_once_and_carries_its_evidence(store, smoke):
    s = store.spec(smoke, 'mufac', 2, 0, 'neggrad'); run = store.get(s)
    assert {p.name for p in run.folder.iterdir()} == {'spec.json', 'request.json', 'metrics.json', 'model.safetensors'}
    assert len(run.metrics['losses']['forget']) == len(store.request(s).forget)
    pre = store.folder(store.pretrain_of(s))
    assert {'log.csv', 'request.json', 'model.safetensors'} <= {p.name for p in pre.iterdir()}, 'it made what it depends on'
    t = (run.folder / 'metrics.json').stat().st_mtime_ns
    store.get(s)
    assert (run.folder / 'metrics.json').stat().st_mtime_ns == t
    assert not list(store.root.glob('.*.part'))


def test_the_same_specification_gives_the_same_numbers(store, smoke, tmp_path, data_dir):
    s = store.spec(smoke, 'celeba', 2, 0, 'metaunlearn'); other = RunStore(tmp_path / 'elsewhere', data_dir)
    drop = lambda m: {k: v for k, v in m.items() if 'seconds' not in k}
    assert drop(store.get(s).metrics) == drop(other.get(s).metrics)


def test_what_changes_a_result_changes_the_digest(store, smoke):
    a = store.spec(smoke, 'mufac', 2, 0, 'neggrad')
    assert (
        a.digest
        != store.spec(smoke, 'mufac', 2, 1, 'neggrad').digest
        != store.spec(smoke, 'mufac', 2, 0, 'neggrad', dict(lr=0.2)).digest
    )
    assert store.folder(store.spec(smoke, 'mufac', 2, 0, 'pretrain')) == store.folder(
        store.spec(smoke, 'mufac', 3, 0, 'pretrain')
    ), 'one Pretrain serves every size'


def test_a_tampered_run_is_not_read(store, smoke):
    s = store.spec(smoke, 'mufac', 2, 0, 'retrain')
    run = store.get(s)
    f = run.folder / 'spec.json'
    d = json.loads(f.read_text())
    d['seed'] = 9
    f.write_text(json.dumps(d))
    with pytest.raises(FacesError, match='Delete this folder'): store.get(s)


def test_a_damaged_model_is_named(store, smoke):
    s = store.spec(smoke, 'mufac', 2, 0, 'retrain')
    run = store.get(s)
    f = run.folder / 'model.safetensors'
    f.write_bytes(f.read_bytes()[:100])
    with pytest.raises(FacesError, match='model.safetensors: cannot be read'): run.model()


def test_killed_training_resumes_to_the_same_weights(store, smoke, tmp_path, data_dir):
    slow = smoke.model_copy(update=dict(train=smoke.train.model_copy(update=dict(epochs=4))))
    s = store.spec(slow, 'mufac', 2, 0, 'retrain')
    code = textwrap.dedent('''
        import os, sys
        import oneshui.vit as vit
        from oneshui.runs import RunStore, RunSpec
        real = vit._save_state
        def save(*a):
            real(*a)
            if a[-1]['epoch'] == 1: os._exit(9)     # the power goes
        vit._save_state = save
        RunStore(sys.argv[1], sys.argv[2]).get(RunSpec.model_validate_json(sys.argv[3]))
    ''')
    r = subprocess.run(
        [sys.executable, '-c', code, str(store.root), str(data_dir), s.model_dump_json()],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 9, r.stderr[-2000:]; assert not store.has(s)
    state = json.loads((store.root / f'.{s.name}.part/state/state.json').read_text())
    assert state['epoch'] == 1
    resumed = load_file(store.get(s).folder / 'model.safetensors')
    whole = load_file(RunStore(tmp_path / 'whole', data_dir).get(s).folder / 'model.safetensors')
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def _ask(root, data, spec, out):
    from oneshui.runs import RunSpec
    RunStore(root, data).get(RunSpec.model_validate_json(spec))
    out.put(os.getpid())


def test_two_processes_ask_for_one_run(store, smoke):
    s = store.spec(smoke, 'mufac', 2, 0, 'ssd'); ctx = multiprocessing.get_context('spawn'); out = ctx.Queue()
    ps = [ctx.Process(target=_ask, args=(store.root, store.data_dir, s.model_dump_json(), out)) for _ in range(2)]
    [p.start() for p in ps]; [p.join(120) for p in ps]; assert [p.exitcode for p in ps] == [0, 0]
    assert store.get(s).metrics['forget'] >= 0 and len(list(store.root.glob('mufac-2-seed0-ssd-*'))) == 1


def test_one_shot_methods_get_nothing_but_the_support_set(store, smoke):
    seen = {}
    @method('spy', 'Spy')
    def spy(model, support, state): seen.update(vars(support)); return model
    try:
        s = store.spec(smoke, 'mufac', 2, 0, 'spy', {})
        store.get(s)
        assert set(seen) == {'x', 'y', 'identity'} and len(seen['x']) == 2
    finally: del METHODS['spy']


def test_a_method_cannot_change_the_model_it_was_handed(store, smoke):
    s = store.spec(smoke, 'mufac', 2, 0, 'pretrain')
    m = store.get(s).model()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    D = store.sets(s)
    from oneshui.vit import support_set
    S = support_set(D['val'].pixels, store.request(s).support)
    for name, x in METHODS.items():
        hp = smoke.hyper('mufac', name, 3) | (dict(simulated_size=3) if 'simulated_size' in x.hyper else {})
        full = {k: D[k] for k in ('retain', 'forget')} if x.access == 'full' else {}
        u = x.unlearn(m, S, x.prepare(m, D['train'], D['val'], hp), hp, **full)
        assert all(torch.equal(before[k], v) for k, v in m.state_dict().items()) and not u.training, name


def test_a_failing_run_is_named_and_the_others_are_kept(store, smoke):
    cells = smoke.model_dump()
    cells['cells']['mufac']['train'] = dict(lr=1e30, clip=None)
    broken = type(smoke)(**cells)
    with pytest.raises(FacesError, match='mufac-.*FloatingPointError.*Lower train.lr'):
        run_grid(store, broken, ['mufac'], [0], ['pretrain', 'retrain'])


def test_method_names_and_hyper_parameters_are_checked_first(store, smoke):
    with pytest.raises(KeyError, match='Valid: neggrad'): store.spec(smoke, 'mufac', 2, 0, 'magic', {})
    with pytest.raises(TypeError, match='unknown hyper-parameter speed'):
        store.spec(smoke, 'mufac', 2, 0, 'neggrad', dict(lr=1, speed=2))
    with pytest.raises(KeyError, match='table holds N_S = 2, 3'): store.spec(smoke, 'mufac', 7, 0, 'neggrad')
    with pytest.raises(KeyError): get_method('nothing')


def test_parameters_from_papermill():
    p, _ = check_parameters(dict(preset='smoke', datasets='["mufac"]', seeds='[0, 1]', data_dir=None))
    assert p.datasets == ['mufac'] and p.seeds == [0, 1]
    assert check_parameters(dict(preset='smoke', seeds=3))[0].seeds == [3]
    with pytest.raises(ValueError, match='unknown parameter sedes'):
        check_parameters(dict(preset='smoke', sedes=[1]))


@pytest.mark.parametrize('name', ['smoke', 'mini', 'paper'])
def test_presets_fit_the_registry(name):
    "Every hyper-parameter in a preset is one that its method knows, and no required one is missing."
    P = load_preset(name)
    for d, cell in P.cells.items():
        for n in cell.n_forget:
            for m, x in METHODS.items():
                x.check((dict(simulated_size=n) if 'simulated_size' in x.hyper else {}) | P.hyper(d, m, n))


def test_dependencies_have_digests_of_their_own(store, smoke):
    s = store.spec(smoke, 'mufac', 2, 0, 'neggrad')
    assert s.digest and store.pretrain_of(s) == store.pretrain_of(
        store.spec(smoke, 'mufac', 2, 0, 'pretrain')
    ) == store.spec(smoke, 'mufac', 3, 0, 'pretrain')
    assert store.retrain_of(s).digest == store.spec(smoke, 'mufac', 2, 0, 'retrain').digest
    for m in ('neggrad', 'ssd'): store.get(store.spec(smoke, 'mufac', 2, 0, m))
    assert len(list(store.root.glob('mufac-3-seed0-pretrain-*'))) == 1, 'both methods start from one Pretrain'
