"""The desk on models of one's own: prepare, forget, report, ledger.

Four networks that share nothing but the contract; tiny, so that it takes minutes.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from oneshui.cli import run
from oneshui.core import DataError, StoreError
from oneshui.desk import forget, letter
from oneshui.handlers import build, open_model
from oneshui.kit import read_kit
from oneshui.ledger import DONE, OPEN, read_ledger
from oneshui.portraits import draw_person, draw_photo, render
from oneshui.preparing import asked, prepare

torch.set_num_threads(1)
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
CNN = '''
from torch import nn
class Net(nn.Module):
    preprocessing = dict(size=(32, 32), mean=(.5, .4, .3), std=(.2, .3, .4))
    def __init__(self, outputs):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, outputs)
        self.unused = nn.Linear(2, 2)   # parameters that no gradient reaches
    def forward(self, x): return self.head(self.body(x))
def make(outputs=3): return Net(outputs)
'''
QUICK = dict(requests=4, turns=2, sample=16,
             hyper=dict(requests=2, calibration=0, start=1, batch_size=8))


@pytest.fixture(scope='module')
def office(tmp_path_factory):
    "A folder with 20 drawn people, four images each, and two tables of them."
    root = tmp_path_factory.mktemp('office')
    rows = []
    for i in range(20):
        person = draw_person(0, i)
        for j in range(4):
            f = root / f'{i}_{j}.png'
            Image.fromarray(render(person, draw_photo(0, i, j, person), 32)).save(f)
            part = ('portrait' if j == 0 else 'train') if i < 14 else 'val'
            rows.append(dict(path=f.name, identity=f'Ann Example {i}', split=part,
                             age=(i * 7 + j) % 3))
    t = pd.DataFrame(rows)
    t.to_csv(root / 'ages.csv', index=False)
    rng = np.random.default_rng(0)
    for k in range(4): t[f'a{k}'] = rng.integers(0, 2, len(t))
    t.drop(columns='age').to_csv(root / 'attributes.csv', index=False)
    (root / 'net.py').write_text(CNN)
    return root


def weights(root, name, options, outputs):
    "Random weights in a file."
    torch.manual_seed(0)
    f = root / f'{re.sub("[^a-z0-9]", "-", name[-30:])}-{outputs}.safetensors'
    if not f.exists(): save_file(build(name, options, outputs)[0].state_dict(), f)
    return str(f)


def small_transformer(folder, outputs):
    "A ViT of transformers from a configuration, as save_pretrained writes it."
    transformers = pytest.importorskip('transformers')
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        intermediate_size=64, patch_size=8, num_labels=outputs)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / 'preprocessor_config.json').write_text(json.dumps(dict(
        size=dict(height=32, width=32), image_mean=[.5] * 3, image_std=[.5] * 3)))
    return f'transformers:{folder}'


def model_of(kind, root, outputs):
    "Fields of `Asked` for one of the four networks."
    if kind == 'transformers':
        folder = root / f'hf{outputs}'
        folder.mkdir(exist_ok=True)
        return dict(model=small_transformer(folder, outputs))
    name, options = {
        'timm': ('timm:vit_base_patch16_224', SMALL),
        'torchvision': ('torchvision:resnet18', {}),
        'function': (f'{root}/net.py:make', dict(outputs=outputs))}[kind]
    own = {} if kind == 'function' else dict(preprocessing=dict(
        size=(32, 32), resize=None, mean=(.5,) * 3, std=(.5,) * 3))
    return dict(model=name, options=options, weights=weights(root, name, options,
                                                             outputs)) | own


def made(office, tmp_path, kind='function', table='ages', **more):
    "A kit for one of the networks."
    given = model_of(kind, office, 3 if table == 'ages' else 4)
    prepare(asked(data=str(office / f'{table}.csv'), kit=str(tmp_path / 'kit'),
                  **given | QUICK | more), say=lambda text: None)
    return tmp_path / 'kit'


@pytest.fixture(scope='module')
def kit(office, tmp_path_factory):
    "The kit of a hand-written CNN, to be copied."
    return made(office, tmp_path_factory.mktemp('made'))


@pytest.fixture
def desk(kit, tmp_path):
    "A copy of that kit, and a place for what is written."
    shutil.copytree(kit, tmp_path / 'kit')
    return tmp_path


def ask(desk, office, who=0, out='m2', **more):
    "One request at a desk."
    return forget(letter(
        kit=str(desk / 'kit'), portraits=[str(office / f'{who}_0.png')],
        out=str(desk / f'{out}.safetensors'), **more), lambda text: None)


def lines_of(desk):
    from oneshui.kit import kit_sha
    return read_ledger(desk / 'kit/ledger.jsonl', kit_sha(desk / 'kit'))


KINDS = [('timm', 'ages'), ('torchvision', 'attributes'),
         ('transformers', 'attributes'), ('function', 'ages')]


@pytest.mark.parametrize('kind, table', KINDS, ids=lambda x: x)
def test_prepare_and_forget(kind, table, office, tmp_path):
    label = 'a1,a3' if table == 'attributes' else '2'
    few = dict(requests=2, turns=1) if kind == 'torchvision' else {}   # it is large
    folder = made(office, tmp_path, kind, table, **few)
    kit, _ = read_kit(folder)
    old = Path(kit.weights).read_bytes()
    report = ask(tmp_path, office, labels=[label], checks=[str(office / '3_1.png')])
    assert Path(kit.weights).read_bytes() == old, 'the old weights are never touched'
    tensors = load_file(tmp_path / 'm2.safetensors')
    assert len(tensors) == len(load_file(kit.weights)), 'loads where the old ones did'
    again = kit.model.load(tmp_path / 'm2.safetensors')
    assert not again.training and report['moved'] > 0
    assert report['portraits'][0]['label'] == label.replace(',', ', ')
    before = kit.model.load(kit.weights)
    for (k, a), (_, b) in zip(before.named_buffers(), again.named_buffers()):
        assert torch.equal(a, b), f'{k}: a step leaves the statistics of batch norm'
    page = (tmp_path / 'm2.report.html').read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page)
    assert 'not checked' in page and all((a or b).startswith('#') for a, b in links)


def test_a_kit_holds_no_image_and_no_name(office, kit):
    "Names, file names and pixels of the training set are looked for in every byte."
    stuff = b''.join(f.read_bytes() for f in kit.iterdir() if f.is_file())
    assert b'Ann' not in stuff and b'Example' not in stuff and b'_1.png' not in stuff
    flat = load_file(kit / 'state.safetensors')
    small = 3 * 32 * 32
    assert all(v.numel() < small for v in flat.values()), 'no tensor could be an image'
    assert sum(f.stat().st_size for f in kit.iterdir()) < 60_000
    k, _ = read_kit(kit)
    assert k.data.people == 14 and k.data.strangers == 6 and k.data.held_out == 14
    assert k.rehearsal.portraits == 'held out' and len(k.rehearsal.in_turn) == 2
    assert {'this kit', 'SSD', 'the training images'} <= {*k.sizes}
    written = sum((kit / f).stat().st_size for f in ('kit.json', 'state.safetensors'))
    assert abs(k.sizes['this kit'] - written) < 9, 'digits of its own size'


def test_the_next_request_goes_on_from_the_last(desk, office):
    first = ask(desk, office, 0, people=['case 17'])
    second = ask(desk, office, 1, 'm3', labels=['1'])
    assert second['before'] == first['after'] and second['path'] > first['path']
    one, two = lines_of(desk)
    assert (one.number, two.number) == (1, 2) and two.previous == one.hash
    assert one.labels != 'given' and two.labels == 'given'
    text = (desk / 'kit/ledger.jsonl').read_text()
    assert 'case' not in text and '_0.png' not in text
    with pytest.raises(DataError, match='forgotten already, in request 1'):
        ask(desk, office, 0, 'm4')
    with pytest.raises(DataError, match='(?i)case 17 ?: has been forgotten already'):
        ask(desk, office, 2, 'm4', people=['Case 17 '])
    assert ask(desk, office, 0, 'm4', again=True)['number'] == 3


def test_same_portrait_in_another_file_is_noticed(desk, office, tmp_path):
    ask(desk, office, 0)
    copy = tmp_path / 'renamed.bmp'
    Image.open(office / '0_0.png').save(copy)
    with pytest.raises(DataError, match='renamed.bmp: has been forgotten already'):
        forget(letter(kit=str(desk / 'kit'), portraits=[str(copy)],
                      out=str(desk / 'm3.safetensors')), print)


def test_time_to_retrain(desk, office, capsys):
    "More requests than the rehearsal played in turn."
    said = [ask(desk, office, k, f'm{k}')['limits'] for k in range(6)]
    assert 'TIME TO RETRAIN' in said[-1]
    assert run(['show', str(desk / 'kit')]) == 0
    out = capsys.readouterr().out
    assert 'TIME TO RETRAIN' in out and '6 requests' in out


def test_a_changed_ledger_is_detected(desk, office):
    ask(desk, office, 0), ask(desk, office, 1, 'm3')
    f = desk / 'kit/ledger.jsonl'
    one, two = f.read_text().splitlines()
    for text in (one.replace('"number":1', '"number":9'), two, f'{two}\n{one}',
                 f'{one}\n{{}}', one.replace('"moved":0', '"moved":1')):
        f.write_text(text + '\n')
        with pytest.raises(StoreError, match='ledger.jsonl: line'): lines_of(desk)
        assert run(['show', str(desk / 'kit')]) == 1
    for text in (one + '\n', ''):   # its end is cut off, or all of it
        f.write_text(text)
        with pytest.raises(StoreError, match='the last request is not there'):
            ask(desk, office, 2, 'm4', weights=str(desk / 'm3.safetensors'))
    f.unlink()
    with pytest.raises(StoreError, match='ledger.jsonl: line 1 is missing'):
        ask(desk, office, 2, 'm4')
    (desk / 'kit/ledger.head').unlink()   # as kits were before: the model tells
    f.write_text(one + '\n')
    with pytest.raises(DataError, match='is not the model after request 1'):
        ask(desk, office, 2, 'm4', weights=str(desk / 'm3.safetensors'))
    f.write_text(f'{one}\n{two}\n')
    assert ask(desk, office, 2, 'm4')['number'] == 3


def test_several_portraits_of_several_people(desk, office):
    report = forget(letter(
        kit=str(desk / 'kit'), out=str(desk / 'm2.safetensors'), labels=['0', '1', '2'],
        portraits=[str(office / f'{k}_0.png') for k in (0, 1, 2)],
        people=['a', 'b', 'c']), print)
    assert [p['label'] for p in report['portraits']] == ['0', '1', '2']
    assert report['people'] == 3
    assert any('requests of 1' in w for w in report['warnings'])
    assert not any('--person' in w for w in report['warnings'])
    assert 'weights' not in report, 'a path may hold a name'


def test_it_is_said_that_nobody_said_whose_portraits_these_are(desk, office):
    report = forget(letter(
        kit=str(desk / 'kit'), out=str(desk / 'm2.safetensors'), labels=['0'],
        portraits=[str(office / f'0_{k}.png') for k in (0, 1)]), print)
    assert any('--person' in w for w in report['warnings'])


def test_unlike_anything_is_named(desk, office, tmp_path):
    "A chessboard is no portrait; a portrait is no chessboard."
    board = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((8, 8))) * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / 'board.png')
    report = forget(letter(
        kit=str(desk / 'kit'), portraits=[str(tmp_path / 'board.png')],
        out=str(desk / 'm2.safetensors')), print)
    assert any('UNLIKE ANYTHING' in w for w in report['warnings'])
    assert not any('UNLIKE' in w for w in ask(desk, office, 0, 'm3')['warnings'])


def test_moved_or_other_weights(desk, office, tmp_path):
    kit, _ = read_kit(desk / 'kit')
    other = shutil.copy(kit.weights, tmp_path / 'elsewhere.safetensors')
    assert ask(desk, office, weights=str(other))['number'] == 1
    with pytest.raises(DataError, match='is not the model after request 1'):
        ask(desk, office, 1, 'm3', weights=kit.weights)


# Whatever happens, the old state or the new one

STARTS = '''
import sys, torch
torch.set_num_threads(1)
from oneshui.cli import run
print('ready', flush=True)
sys.stdin.readline()
sys.exit(run(sys.argv[1:]))
'''


def started(*argv):
    "A process that waits for a line before it begins."
    env = os.environ | dict(OMP_NUM_THREADS='1', ONESHUI_PROGRESS='off')
    p = subprocess.Popen([sys.executable, '-c', STARTS, *map(str, argv)], env=env,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'ready\n'
    return p


def whole(desk, out='m2'):
    "Are weights, report and ledger line all there, or all absent? 1 or 0."
    parts = [(desk / f'{out}{x}').exists()
             for x in ('.safetensors', '.report.json', '.report.html')]
    parts.append(bool(lines_of(desk)))
    assert len(set(parts)) == 1, parts
    left = {p.name for p in desk.iterdir() if p.name.startswith('.')}
    assert not left | {p.name for p in (desk / 'kit').iterdir()} & {OPEN, DONE}
    return int(parts[0])


def killed(desk, office, wait):
    "Forget in a process of its own, killed after a while; then somebody looks."
    p = started('forget', desk / 'kit', office / '0_0.png', '--out',
                desk / 'm2.safetensors')
    p.stdin.write('\n')
    p.stdin.flush()
    time.sleep(wait)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert run(['show', str(desk / 'kit')]) == 0
    return whole(desk)


@pytest.mark.skipif(os.name != 'posix', reason='kill -9')
def test_killed_at_random_moments(desk, office, tmp_path):
    "ONESHUI_KILLS=20 for the long form."
    kills = int(os.environ.get('ONESHUI_KILLS', 2))
    for k, wait in enumerate(np.random.default_rng(0).uniform(0, 1.5, kills)):
        place = tmp_path / str(k)
        shutil.copytree(desk / 'kit', place / 'kit')
        killed(place, office, wait)


def test_stopped_at_every_step_of_writing(desk, office, tmp_path, monkeypatch):
    "Each rename and each flush is the last thing that happens, in turn."
    from oneshui import ledger
    real, seen = dict(replace=os.replace, fsync=os.fsync), set()

    class Died(BaseException): "kill -9, played: nothing of ours runs afterwards."

    for at in range(1, 20):
        place, count = tmp_path / str(at), [0]
        shutil.copytree(desk / 'kit', place / 'kit')

        def dying(name):
            def call(*args):
                count[0] += 1
                if count[0] >= at: raise Died
                return real[name](*args)
            return call
        with monkeypatch.context() as m:
            for name in real: m.setattr(ledger.os, name, dying(name))
            try: ask(place, office)
            except Died: pass
        assert run(['show', str(place / 'kit')]) == 0
        seen.add(whole(place))
        if count[0] < at: break
    assert seen == {0, 1}, 'both ends were met'


def test_a_kit_that_was_moved_in_between(desk, office, tmp_path, monkeypatch, capsys):
    "What was decided is finished where the kit is now, or nothing is thrown away."
    from oneshui import ledger
    from oneshui.kit import kit_sha

    class Died(BaseException): "Between the decision and the last renames."

    def stop(folder):
        if (folder / DONE).exists(): raise Died
    with monkeypatch.context() as m:
        m.setattr(ledger, 'recover', stop)
        with pytest.raises(Died): ask(desk, office)
    parts = list(desk.glob('.m2*.part'))
    assert len(parts) == 3 and not lines_of(desk)
    kit = shutil.move(desk / 'kit', desk / 'moved')
    (desk / 'away').mkdir()
    for p in parts: shutil.move(p, desk / 'away')
    assert run(['show', str(kit)]) == 1
    assert 'is to be finished' in capsys.readouterr().err and (kit / DONE).exists()
    for p in parts: shutil.move(desk / 'away' / p.name, p)
    assert run(['show', str(kit)]) == 0
    assert len(read_ledger(kit / 'ledger.jsonl', kit_sha(kit))) == 1
    assert (desk / 'm2.safetensors').exists() and not list(desk.glob('.m2*'))


def test_the_last_hash_is_shown(desk, office, capsys):
    ask(desk, office, out='m\u2028')   # it separates lines, in a path it does not
    capsys.readouterr()
    assert run(['show', str(desk / 'kit')]) == 0
    assert lines_of(desk)[-1].hash[:16] in capsys.readouterr().out


def test_two_at_once_queue_up(desk, office):
    said, done = [], []
    def go(k):
        done.append(forget(letter(
            kit=str(desk / 'kit'), portraits=[str(office / f'{k}_0.png')],
            out=str(desk / f'm{k}.safetensors')), said.append))
    two = [threading.Thread(target=go, args=(k,)) for k in (0, 1)]
    for t in two: t.start()
    for t in two: t.join()
    one, other = sorted(done, key=lambda r: r['number'])
    assert (one['number'], other['number']) == (1, 2)
    assert other['before'] == one['after'] and len(lines_of(desk)) == 2


# The same numbers as the run store

def test_equal_to_the_run_store(shared, smoke, tmp_path):
    "On the embedded data, prepare and forget give what runs give."
    hyper = dict(sizes='tensor', start=2, requests=3, calibration=1)
    spec = shared.spec(smoke, 'mufac', 2, 0, 'metastep', hyper)
    r, faces = shared.request(spec), shared.faces('mufac')
    split = np.full(len(faces), 'portrait', object)
    for part in ('train', 'val', 'test'): split[getattr(r, part)] = part
    who = faces.identities[faces.identity]
    table = pd.DataFrame(dict(path=faces.paths, identity=who, split=split,
                              age=faces.targets))
    table.to_csv(faces.root / 'desk.csv', index=False)
    before = shared.get(shared.related(spec, 'pretrain'))
    given = dict(model=f'timm:{smoke.model.arch}', data=str(faces.root / 'desk.csv'),
                 options=smoke.model.options | dict(img_size=32),
                 weights=str(before.file('model.safetensors')), people=2,
                 preprocessing=dict(size=(32, 32), resize=None,
                                    interpolation='bilinear'),
                 kit=str(tmp_path / 'kit'), requests=2, turns=1, sample=16)
    prepare(asked(**given, hyper=hyper), say=lambda text: None)
    forget(letter(kit=str(tmp_path / 'kit'), out=str(tmp_path / 'm.safetensors'),
                  portraits=[str(faces.root / faces.paths[i]) for i in r.support],
                  labels=[str(faces.targets[i]) for i in r.support]), print)
    ours = load_file(tmp_path / 'm.safetensors')
    theirs = shared.get(spec).model().state_dict()
    assert ours.keys() == theirs.keys()
    moved = max((ours[k] - before.model().state_dict()[k]).abs().max() for k in ours)
    for k in ours: torch.testing.assert_close(ours[k], theirs[k], rtol=1e-5,
                                              atol=1e-4 * float(moved))


def test_a_folder_a_person(office, tmp_path):
    "No labels: the model's own answers stand in, and the kit says so."
    for f in office.glob('*_*.png'):
        i, j = map(int, f.stem.split('_'))
        to = tmp_path / 'people' / ('train' if i < 14 else 'val') / f'p{i}' / f.name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, to)
    given = model_of('function', office, 3)
    kit = prepare(asked(data=str(tmp_path / 'people'), kit=str(tmp_path / 'kit'),
                        **given | QUICK), say=lambda text: None)
    assert kit.data.own_labels and kit.rehearsal.portraits == 'trained on'
    report = ask(tmp_path, office)
    assert any('own answers' in n for n in report['not_checked'])


def test_nobody_says_who_is_a_stranger(office, tmp_path):
    "A table without `split`, and a folder a person: both say that strangers are drawn."
    t = pd.read_csv(office / 'ages.csv')
    bare = t[t.split != 'portrait'].drop(columns='split')
    bare.to_csv(office / 'bare.csv', index=False)
    for j, i in t[t.split == 'train'].path.str.split('_').str[0].items():
        (tmp_path / f'staff/{i}').mkdir(parents=True, exist_ok=True)
        shutil.copy(office / t.path[j], tmp_path / f'staff/{i}')
    heard = []
    for where in ('bare', 'staff'):
        data = office / 'bare.csv' if where == 'bare' else tmp_path / 'staff'
        prepare(asked(data=str(data), kit=str(tmp_path / where / 'kit'),
                      **model_of('function', office, 3) | QUICK), say=heard.append)
        kit, _ = read_kit(tmp_path / where / 'kit')
        assert kit.data.assumed
        assert kit.data.strangers == (kit.data.people + kit.data.strangers) // 5
        report = ask(tmp_path / where, office)
        assert any('by chance' in said for said in report['not_checked'])
    assert sum('split' in line for line in heard) == 2


def test_other_one_shot_methods(office, tmp_path):
    for method, hyper in (('neggrad', dict(lr=.01)), ('pgu', dict(lr=.01, epochs=1,
                          gamma=.9)), ('ssd', dict(dampening=.5, selection=10.))):
        folder = made(office, tmp_path / method, method=method, hyper=hyper, requests=3,
                      turns=1)
        assert read_kit(folder)[0].method == method
        assert ask(tmp_path / method, office)['number'] == 1


def test_retrained_requests(office, tmp_path):
    folder = made(office, tmp_path, retrain=1, recipe=dict(epochs=1, lr=.01, crop=1))
    one, = read_kit(folder)[0].rehearsal.retrained
    assert {*one} == {'tow', 'tow_nothing', 'tow_again'} and max(one.values()) <= 100


def test_logits_are_those_of_the_network(office):
    "The wrapper changes no number, and its features are what the head is fed with."
    given = model_of('function', office, 3)
    source, model, classes, _ = open_model(given['model'], given['weights'],
                                           given['options'])
    x = torch.rand(2, 3, 32, 32)
    net = build(source.name, source.options)[0].eval()
    net.load_state_dict(load_file(given['weights']))
    assert torch.equal(model(x), net(x))
    seen = model.forward_features(x)
    torch.testing.assert_close(model.net.head(model.forward_head(seen, True)), net(x))
    assert source.preprocessing.mean == (.5, .4, .3) and classes is None
