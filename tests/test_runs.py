"""The run store: nothing is lost, made twice, or read that was not written."""

import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from oneshui.core import PresetError, StoreError
from oneshui.methods import METHODS, method
from oneshui.metrics import METRICS, metric
from oneshui.presets import PRESETS, check_parameters, load_preset
from oneshui.runs import (
    RunSpec,
    RunStore,
    Seeds,
    StaleRun,
    check_runs,
    code_of,
    make_runs,
    measure,
    question,
    run_grid,
)
from oneshui.runs import main as check_command
from oneshui.tuning import tune, tuning_requests, with_settings


@pytest.fixture
def store(tmp_path, data_dir):
    return RunStore(tmp_path / 'runs', data_dir)


def when(store, s):
    return (store.folder(s) / 'manifest.json').stat().st_mtime_ns


# ---- a run is made once, carries its evidence, and is the same everywhere


def test_a_run_is_made_once_and_carries_its_evidence(store, smoke):
    s = store.spec(smoke, 'mufac', 2, 0, 'neggrad')
    run = store.get(s)
    assert {f.name for f in run.folder.iterdir()} == {
        'spec.json',
        'request.json',
        'manifest.json',
        'model.safetensors',
        'outputs.safetensors',
    }
    pre = store.folder(store.related(s, 'pretrain'))
    assert {'log.csv', 'model.safetensors'} <= {f.name for f in pre.iterdir()}, (
        'it made Pretrain'
    )
    made = when(store, s)
    store.get(s)
    assert when(store, s) == made and not list(store.root.glob('.*.part'))


def test_stored_outputs_are_the_models(shared, smoke):
    s = shared.spec(smoke, 'celeba', 2, 0, 'neggrad')
    seen, D = shared.outputs(s), shared.sets(s)
    model = shared.get(s).model()
    for d in ('support', 'forget', 'test'):
        x, y = D[d].tensors()
        assert torch.allclose(seen.logits[d], model(x), atol=1e-5) and torch.equal(
            seen.targets[d], y
        )
        assert seen.identity[d].tolist() == D[d].identity.tolist()


def test_the_same_specification_gives_the_same_numbers(
    store, smoke, tmp_path, data_dir
):
    s = store.spec(smoke, 'celeba', 2, 0, 'metaunlearn')
    other = RunStore(tmp_path / 'elsewhere', data_dir)
    timeless = lambda m: {k: v for k, v in m.items() if 'seconds' not in k}
    assert timeless(store.metrics(s)) == timeless(other.metrics(s))


def test_two_processes_make_a_run_once(store, smoke, tmp_path):
    s, ctx = (
        store.spec(smoke, 'mufac', 2, 0, 'ssd'),
        multiprocessing.get_context('spawn'),
    )
    log = tmp_path / 'made'
    args = (store.root, store.data_dir, s.model_dump_json(), log)
    both = [ctx.Process(target=_ask, args=args) for _ in range(2)]
    for p in both:
        p.start()
    for p in both:
        p.join(120)
    assert [p.exitcode for p in both] == [0, 0]
    made = log.read_text().split()
    assert len(made) == 3 == len(set(made)), (
        'Pretrain, the preparation and SSD, each by one'
    )
    assert store.metrics(s)['forget'] >= 0


def _ask(root, data, spec, log):
    make = RunStore.make

    def counted(self, s):
        with open(log, 'a') as f:
            f.write(s.name + '\n')
        make(self, s)

    RunStore.make = counted
    RunStore(root, data).get(RunSpec.model_validate_json(spec))


def test_killed_training_resumes_to_the_same_weights(store, smoke, tmp_path, data_dir):
    slow = smoke.model_copy(
        update=dict(train=smoke.train.model_copy(update=dict(epochs=4)))
    )
    s = store.spec(slow, 'mufac', 2, 0, 'retrain')
    code = textwrap.dedent("""
        import os, sys, torch
        import oneshui.vit as vit
        torch.set_num_threads(2)              # as in these tests
        from oneshui.runs import RunStore, RunSpec
        real, count = vit.save_training, [0]
        def save(*a, **k):
            real(*a, **k); count[0] += 1
            if count[0] == 2: os._exit(9)     # the power goes after the second epoch
        vit.save_training = save
        RunStore(sys.argv[1], sys.argv[2]).get(RunSpec.model_validate_json(sys.argv[3]))
    """)
    command = [
        sys.executable,
        '-c',
        code,
        str(store.root),
        str(data_dir),
        s.model_dump_json(),
    ]
    r = subprocess.run(command, capture_output=True, text=True)
    assert r.returncode == 9 and not store.has(s), r.stderr[-2000:]
    torch.set_num_threads(2)   # another test may have left one
    run = store.get(s)
    assert len(run.log()) == 4
    whole = RunStore(tmp_path / 'whole', data_dir).get(s)
    a, b = (load_file(r.folder / 'model.safetensors') for r in (run, whole))
    assert all(torch.equal(a[k], b[k]) for k in b)


# ---- what enters the identity of a run, and what does not


def test_each_setting_changes_the_digest(shared, smoke):
    spec = lambda seed=0, hyper=None, preset=smoke, n=2: shared.spec(
        preset, 'mufac', n, seed, 'neggrad', hyper
    )
    base, longer = (
        spec(),
        smoke.model_copy(
            update=dict(train=smoke.train.model_copy(update=dict(epochs=3)))
        ),
    )
    seeds = lambda **k: Seeds(**dict(request=0, training=0, unlearning=0) | k)
    others = [
        spec(1),
        spec(hyper=dict(lr=0.2)),
        spec(preset=longer),
        spec(n=3),
        spec(seeds(request=1)),
        spec(seeds(training=1)),
        spec(seeds(unlearning=1)),
    ]
    assert len({s.digest for s in [base, *others]}) == len(others) + 1
    assert spec(hyper=dict(lr=0.1)).digest == base.digest, "the preset's own value"
    default = shared.spec(smoke, 'mufac', 2, 0, 'metaunlearn')
    said = shared.spec(
        smoke, 'mufac', 2, 0, 'metaunlearn', default.hyper | dict(dropout=0.5)
    )
    assert said.digest == default.digest, 'a default that is said is the default'


def test_seeds_reach_no_further_than_they_should(shared, smoke):
    ask = lambda **k: shared.spec(
        smoke, 'mufac', 2, Seeds(**dict(request=0, training=0, unlearning=0) | k), 'jit'
    )
    base = ask()
    same = lambda a, b, what: (
        shared.folder(shared.related(a, what)) == shared.folder(shared.related(b, what))
    )
    assert same(base, ask(unlearning=1), 'pretrain') and same(
        base, ask(unlearning=1), 'retrain'
    )
    assert not same(base, ask(training=1), 'pretrain')
    assert (
        shared.request(base).support.tolist()
        == shared.request(ask(training=1)).support.tolist()
    )


def test_one_pretrain_serves_every_request_size(shared, smoke):
    a, b = (shared.spec(smoke, 'mufac', n, 0, 'pretrain') for n in (2, 3))
    assert shared.folder(a) == shared.folder(b)
    forget = [len(shared.outputs(s).logits['forget']) for s in (a, b)]
    assert (
        forget == [len(shared.request(s).forget) for s in (a, b)]
        and forget[0] < forget[1]
    )


def test_requests_of_a_seed_share_training_and_preparation(store, smoke):
    both = smoke.model_copy(update=dict(requests=2))
    ask = lambda m: [store.spec(both, 'mufac', 2, 0, m, number=k) for k in (0, 1)]
    make_runs(store, ask('ssd'), 1)
    prepared = [store.related(s, 'prepared') for s in ask('ssd')]
    for one, other in (ask('pretrain'), prepared):
        assert store.folder(one) == store.folder(other)
    for m in ('retrain', 'ssd'):
        one, other = ask(m)
        assert store.folder(one) != store.folder(other)
        a, b = (store.request(s).forget for s in (one, other))
        assert not np.intersect1d(a, b).size
    one, other = (store.metric(s, 'scores') for s in ask('pretrain'))
    assert one['forget_loss'] != other['forget_loss'], 'one model, two requests'
    alone = store.spec(smoke, 'mufac', 2, 0, 'pretrain')
    assert store.folder(alone) != store.folder(ask('pretrain')[0]), 'other portraits'


def test_a_quick_part_is_a_part():
    p, quick = check_parameters(dict(preset='mini'))
    q, full = check_parameters(dict(preset='mini', full=True))
    assert set(p.seeds) < set(q.seeds) and set(quick.numbers) < set(full.numbers)
    spec = lambda P: P.model_copy(update=dict(asked=None))
    assert spec(quick) == spec(full), 'the same runs'


def test_a_second_retrain_is_independent(shared, smoke):
    s = shared.spec(smoke, 'mufac', 2, 0, 'neggrad')
    a, b = (shared.get(shared.related(s, w)) for w in ('retrain', 'retrain_again'))
    assert (a.logits() - b.logits()).abs().mean() > 1e-3
    assert (
        shared.request(a.spec).retain.tolist() == shared.request(b.spec).retain.tolist()
    )
    one, other = shared.metrics(a.spec), shared.metrics(b.spec)
    assert one['tow'] == 100 >= other['tow'] and one['test_loss'] != other['test_loss']


def test_changed_pixels_are_other_data(store, smoke, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(store.data_dir, copy)
    first = RunStore(store.root, copy)
    s = first.spec(smoke, 'mufac', 2, 0, 'retrain')
    first.get(s)
    path = copy / 'mufac' / first.faces('mufac').paths[3]
    image = Image.open(path).convert('RGB')
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)
    again = RunStore(store.root, copy)
    t = again.spec(smoke, 'mufac', 2, 0, 'retrain')
    assert t.digest != s.digest and not again.has(t) and again.has(s)



# ---- code that changes


@pytest.fixture
def outside(tmp_path, monkeypatch):
    "A method in a file of somebody else's, and a way to edit it."
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    path = tmp_path / 'elsewhere.py'

    def write(body='return model', doc='Does nothing.', version=1):
        path.write_text(
            textwrap.dedent(f'''
            from oneshui.methods import METHODS, method
            METHODS.pop('idle', None)
            @method('Idle', version={version})
            def idle(model, support, state):
                "{doc}"
                {body}
            ''')
        )
        importlib.invalidate_caches()
        sys.modules.pop('elsewhere', None)
        code_of.cache_clear()
        import linecache

        linecache.clearcache()
        importlib.import_module('elsewhere')

    yield write
    METHODS.pop('idle', None)
    sys.modules.pop('elsewhere', None)


def test_a_docstring_costs_nothing_and_code_warns(store, smoke, outside):
    ask = lambda: store.spec(smoke, 'mufac', 2, 0, 'idle', {})
    outside()
    s = ask()
    store.get(s)
    made = when(store, s)
    with warnings.catch_warnings():
        warnings.simplefilter('error', StaleRun)
        outside(doc='Leaves the model as it is.')
        store.get(ask())
    assert ask().digest == s.digest and check_runs(store).empty
    outside(body='return model.eval()')
    with pytest.warns(StaleRun, match='elsewhere.idle'):
        store.get(ask())
    assert when(store, s) == made, 'it warned, and made nothing again'
    listed = check_runs(store)
    assert listed.run.tolist() == [store.folder(s).name] and listed.changed.item() == [
        'elsewhere.idle'
    ]
    outside(body='return model.eval()', version=2)
    assert ask().digest != s.digest and not store.has(ask())


def test_the_fingerprint_reaches_parts_that_a_setting_names():
    seen = code_of(METHODS['metastep'].prepare_fn)
    for part in ('SizePerBand', 'OneSize', 'ForgetAndKeep', 'Alignment'):
        assert any(f'.{part}.' in name for name in seen), part


def test_a_changed_metric_costs_the_metric_and_no_run(shared, smoke):
    s, calls = shared.spec(smoke, 'mufac', 2, 0, 'neggrad'), []

    def declare(version):
        METRICS.pop('worst', None)

        @metric('Largest loss', needs=('pretrain',), version=version)
        def worst(run, pretrain):
            calls.append(version)
            return dict(
                worst=float(run.loss('forget').max() - pretrain.loss('forget').max())
            )

    try:
        declare(1)
        first = shared.metrics(s)
        made = when(shared, s)
        assert shared.metrics(s) == first and calls == [1] and 'worst' in first
        declare(2)
        shared.metrics(s)
        assert calls == [1, 2] and when(shared, s) == made
    finally:
        METRICS.pop('worst', None)


def test_answers_are_kept_until_the_question_changes(shared, smoke):
    s, asked = shared.spec(smoke, 'mufac', 2, 0, 'pretrain'), []

    @question(version=1)
    def how_many(store, s, of='forget'):
        asked.append(of)
        return len(getattr(store.request(s), of))

    ask = lambda **o: measure(shared, how_many, [(s, o)], n_jobs=1)
    assert ask() == ask() and asked == ['forget']
    ask(of='retain')
    how_many.version = 2
    ask()
    assert asked == ['forget', 'retain', 'forget']
    for f in (shared.root / 'results').glob('how_many-*.json'): f.write_text('{"torn')
    with pytest.raises(StoreError, match='Delete it'):
        for o in (dict(), dict(of='retain')):
            ask(**o)
        how_many.version = 1
        ask()
    f.unlink()


# ---- faults


def test_a_tampered_or_damaged_run_is_named(store, smoke):
    s = store.spec(smoke, 'mufac', 2, 0, 'retrain')
    run = store.get(s)
    f = run.folder / 'model.safetensors'
    whole = f.read_bytes()
    f.write_bytes(whole[:100])
    with pytest.raises(StoreError, match='model.safetensors.*Delete the folder'):
        run.model()
    assert check_runs(store).damaged.item() == ['model.safetensors']
    f.write_bytes(whole)
    spec = run.folder / 'spec.json'
    spec.write_text(spec.read_text().replace('"n_forget": 2', '"n_forget": 3'))
    with pytest.raises(StoreError, match='spec.json'):
        store.get(s)
    shutil.rmtree(run.folder)
    assert store.get(s).model() is not None, 'made again once it is deleted'


def test_a_failing_run_is_named_and_the_others_are_kept(store, smoke):
    cells = smoke.model_dump()
    cells['cells']['mufac']['train'] = dict(lr=1e30, clip=None)
    broken = type(smoke)(**cells)
    with pytest.raises(StoreError, match='mufac-.*NumbersError.*Lower train.lr'):
        run_grid(store, broken, ['mufac'], [0], ['pretrain', 'retrain'])


def test_a_diverging_preparation_stops_only_what_needs_it(store, smoke):
    def diverge(model, train, val):
        raise FloatingPointError('A is nan')

    @method('Diverging', prepare=diverge)
    def diverging(model, support, state):
        raise AssertionError('must not be reached')

    try:
        bad, good = (
            store.spec(smoke, 'mufac', 2, 0, 'diverging', {}),
            store.spec(smoke, 'mufac', 2, 0, 'neggrad'),
        )
        with pytest.raises(
            StoreError, match='(?s)^1 of .*diverging-prepared.*A is nan'
        ):
            make_runs(store, [bad, good], 1)
        assert store.has(good) and not store.has(bad)
    finally:
        METHODS.pop('diverging')


def test_wrong_names_fail_before_any_work(store, smoke):
    with pytest.raises(PresetError, match='Valid: neggrad'):
        store.spec(smoke, 'mufac', 2, 0, 'magic', {})
    with pytest.raises(PresetError, match='unknown setting speed'):
        store.spec(smoke, 'mufac', 2, 0, 'neggrad', dict(lr=1, speed=2))
    with pytest.raises(PresetError, match='lr'):
        store.spec(smoke, 'mufac', 2, 0, 'neggrad', dict(lr=-1))
    with pytest.raises(PresetError, match='holds N_S = 2, 3'):
        store.spec(smoke, 'mufac', 7, 0, 'neggrad')
    with pytest.raises(PresetError, match='retrain_again'):
        store.related(store.spec(smoke, 'mufac', 2, 0, 'neggrad'), 'retrained')
    assert not store.root.exists()


def test_jobs_leave_threads_and_progress_as_they_were(shared, smoke, monkeypatch):
    monkeypatch.setenv('ONESHUI_PROGRESS', 'text')
    torch.set_num_threads(2)
    make_runs(shared, [shared.spec(smoke, 'mufac', 2, 0, 'neggrad', dict(lr=0.3))], 1)
    assert torch.get_num_threads() == 2 and os.environ['ONESHUI_PROGRESS'] == 'text'


# ---- the command, notebooks' parameters, presets


def test_runs_check_says_what_is_damaged(store, smoke, capsys):
    s = store.spec(smoke, 'mufac', 2, 0, 'retrain')
    f = store.get(s).folder / 'log.csv'
    def check(folder):
        "Exit code, or what it says on leaving; what it printed."
        with pytest.raises(SystemExit) as left:
            check_command(['runs', 'check', '--store', str(folder)])
        return left.value.code, capsys.readouterr().out
    code, said = check(store.root)
    assert code == 0 and '0 of 1 runs and answers' in said
    f.write_text('')
    code, said = check(store.root)
    assert code == 1 and 'damaged: log.csv' in said
    (f.parent / 'manifest.json').write_text('')
    (store.root / 'results').mkdir(exist_ok=True)
    (store.root / 'results/half.json').write_text('{}')
    code, said = check(store.root)
    assert code == 1 and 'damaged: manifest.json' in said and 'half.json' in said
    assert 'nowhere: no such folder' in check('nowhere')[0]


def test_no_model_is_its_own_reference(store, smoke):
    s = store.spec(smoke, 'mufac', 3, 0, 'retrain')   # the largest request
    again = store.related(s, 'retrain_again')
    assert store.related(s, 'reference') == again
    assert store.related(again, 'reference') == s
    small = store.spec(smoke, 'mufac', 2, 0, 'retrain')
    assert store.related(small, 'reference') == s


def test_every_look_at_images_is_the_runs_own(store, smoke, monkeypatch):
    rough = smoke.model.model_copy(update=dict(antialias=False))
    s = store.spec(smoke.model_copy(update=dict(model=rough)), 'mufac', 2, 0, 'retrain')
    asked, plain = [], RunStore.pixels
    monkeypatch.setattr(RunStore, 'pixels', lambda self, name, size, smooth=True:
                        asked.append(smooth) or plain(self, name, size, smooth))
    store.outputs(s, views=1)
    assert asked and not any(asked)


def test_views_of_other_code_are_named(store, smoke):
    s = store.spec(smoke, 'mufac', 2, 0, 'retrain')
    store.outputs(s, views=1)
    f, = store.folder(s).glob('views-*.safetensors')
    other = {'oneshui.attacks.augmented_logits': 'of then'}
    save_file(load_file(f), f, dict(code=json.dumps(other)))
    with pytest.warns(StaleRun, match='augmented_logits'): store.outputs(s, views=1)


def test_released_scores_go_by_the_released_name(store):
    found = dict(mia=50., released_mia=60., tow=70.)
    assert store.called(found) == found
    store.released = True
    assert store.called(found) == found | dict(mia=60.)


def test_parameters_from_papermill():
    p, _ = check_parameters(
        dict(preset='smoke', datasets='["mufac"]', seeds='[0, 1]', data_dir=None)
    )
    assert p.datasets == p.focus == ['mufac'] and p.seeds == [0, 1]
    assert check_parameters(dict(preset='smoke', seeds=3))[0].seeds == [3]
    given = dict(preset='smoke', seeds='None', datasets='None')
    assert check_parameters(given)[0] == check_parameters(dict(preset='smoke'))[0]
    with pytest.raises(PresetError, match='unknown parameter sedes'):
        check_parameters(dict(preset='smoke', sedes=[1]))


@pytest.mark.parametrize('name', PRESETS)
def test_presets_have_settings_for_every_method(name):
    preset = load_preset(name)
    for d, cell in preset.cells.items():
        for n in cell.n_forget:
            for m in METHODS:
                preset.hyper(d, m, n)


def test_settings_found_on_merged_identities_stay_there():
    p = load_preset('photographs')
    assert p.cell('mufac_merged') == p.cell('mufac'), 'until something is found'
    assert tuning_requests(p, 'mufac_merged') == [(50, 0)]
    found = dict(dataset='mufac_merged', method='neggrad', hyper='{"lr": 7.0}')
    q = with_settings(p, pd.DataFrame([found | dict(chosen=True)]))
    assert q.hyper('mufac_merged', 'neggrad', 50) == dict(lr=7.)
    assert q.cell('mufac') == p.cell('mufac')


def test_tuning_judges_every_candidate_on_the_same_requests(store, smoke):
    both = smoke.model_copy(update=dict(requests=2))
    assert tuning_requests(both, 'mufac') == [(2, 0), (3, 1)]
    grids = dict(neggrad=dict(lr=(.01, .05, 1e30)), jit=dict(lr=(.01,), sigma=(.5,)))
    t = tune(store, both, ['mufac'], grids, 1)
    assert t.requests.eq(2).all() and t.groupby('method').chosen.sum().eq(1).all()
    t = t[t.method == 'neggrad'].set_index('hyper')
    assert t.edge.tolist() == [True, False, True], 'the ends of the grid'
    middle = dict(lr=.05)
    mine = [store.spec(both, 'mufac', n, 100, 'neggrad', middle, number=k)
            for n, k in tuning_requests(both, 'mufac')]
    tow = np.mean([store.metric(s, 'tow')['tow'] for s in mine])
    assert t.tow[json.dumps(middle)] == pytest.approx(tow)
    with pytest.raises(PresetError, match='is reported'):
        tune(store, smoke.model_copy(update=dict(seeds=[100])), ['mufac'], {})


def test_a_grid_is_tidy(shared, smoke):
    t = run_grid(shared, smoke, ['mufac'], [0], ['pretrain', 'retrain'], 1)
    keys = ['dataset', 'n_forget', 'seed', 'request', 'method', 'metric']
    assert not t.duplicated(keys).any()
    assert {'retain', 'forget', 'val', 'test', 'tow', 'mia', 'seconds'} <= set(t.metric)
    assert pd.api.types.is_numeric_dtype(t.value) and set(t.n_forget) == {2, 3}
