"""What people type, and what is in their files: each mistake gets one message that
names the file, the value and the fix, before long work, and leaves nothing behind.
"""
import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from test_desk import made, model_of, office  # noqa: F401 (a fixture)

from oneshui import preparing
from oneshui.cli import run
from oneshui.kit import Kit, digest_of


@pytest.fixture(scope='module')
def kit(office, tmp_path_factory):   # noqa: F811
    return made(office, tmp_path_factory.mktemp('kit'), requests=2, turns=1)


@pytest.fixture(scope='module')
def attribute_kit(office, tmp_path_factory):   # noqa: F811
    return made(office, tmp_path_factory.mktemp('kit'), table='attributes', requests=2,
                turns=1)


class Scene:
    "A folder in which one thing is wrong."
    def __init__(self, root, office, kit):   # noqa: F811
        self.root, self.office = root, office
        self.table = pd.read_csv(office / 'ages.csv', dtype=str)
        self.model = model_of('function', office, 3)
        self.argv = dict(model=self.model['model'], weights=self.model['weights'],
                         options='{"outputs": 3}', kit=str(root / 'new'))
        shutil.copytree(kit, root / 'kit')

    def file(self, name, content=b''):
        f = self.root / name
        f.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(f)

    def image(self, name, image=None, **how):
        image = image or Image.open(self.office / '0_0.png')
        image.save(self.root / name, **how)
        return str(self.root / name)

    def copied(self, image, name):
        f = self.root / name
        f.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, f)

    def csv(self, t):
        t = t.copy()
        if 'path' in t: t['path'] = [p and str(self.office / p) for p in t.path]
        t.to_csv(self.root / 'staff.csv', index=False)
        return str(self.root / 'staff.csv')

    def prepare(self, *more, table=None, **argv):
        argv = self.argv | dict(data=argv.pop('data', None) or self.csv(
            self.table if table is None else table)) | argv
        line = [x for k, v in argv.items() if v for x in (f'--{k}', v)]
        return ['prepare', *line, *map(str, more)]

    def forget(self, *portraits, out='m2.safetensors', kit='kit', more=()):
        portraits = portraits or [self.office / '0_0.png']
        return ['forget', str(self.root / kit), *map(str, portraits), '--out',
                str(self.root / out), *map(str, more)]

    def weights(self, change):
        tensors = load_file(self.model['weights'])
        change(tensors)
        save_file(tensors, self.root / 'w.safetensors')
        return str(self.root / 'w.safetensors')

    def with_line(self, column, value, row=0):
        t = self.table.copy()
        t.loc[row, column] = value
        return t


def drop(name): return lambda tensors: tensors.pop(name)


def put(name, value): return lambda tensors: tensors.__setitem__(name, value)


def recogniser(s):
    who = s.table.identity.drop_duplicates()
    few = who.iloc[[0, 1, 18, 19]].tolist()
    t = s.table[s.table.identity.isin(few)]
    return t.assign(age=t.identity.map({w: str(k) for k, w in enumerate(few)}))


def pt(s):
    torch.save(load_file(s.model['weights']), s.root / 'm.pt')
    return str(s.root / 'm.pt')


def edit_kit(s, **change):
    f = s.root / 'kit/kit.json'
    table = json.loads(f.read_text()) | change
    with suppress(ValidationError): table['own_sha'] = digest_of(Kit(**table))
    f.write_text(json.dumps(table))


def promise_more(s):
    f = s.root / 'kit/kit.json'
    f.write_text(json.dumps(json.loads(f.read_text()) | dict(promise='It works.')))


def grown(image): return image.resize((32, 320))


def answering(s, what):
    "The network of the office, its answer changed."
    source = (s.office / 'net.py').read_text().replace(
        'return self.head(self.body(x))', f'return {what}')
    return s.file('other.py', source) + ':make'


def folder_of(s, *images):
    "People in folders, and these."
    for part, people in dict(train='ab', val='cd').items():
        for who in people:
            for k in range(2): s.copied(s.office / f'{ord(who) % 7}_{k}.png',
                                        f'own/{part}/{who}/{k}.png')
    for path in images: s.copied(s.office / '0_0.png', f'own/{path}')
    return str(s.root / 'own')


PREPARE = {   # what is wrong -> (scene -> argv, what the message has to say)
    'no such model': (lambda s: s.prepare(model='timm:vit_of_ours'),
                      ['timm:vit_of_ours', 'no such']),
    'a model without a colon': (lambda s: s.prepare(model='resnet18'),
                                ['"resnet18"', 'timm:NAME']),
    'no such function': (lambda s: s.prepare(model=f'{s.office}/net.py:build'),
                         ['net.py:build', 'AttributeError']),
    'a function that returns nothing': (lambda s: s.prepare(
        model=s.file('f.py', 'def f(outputs): 0') + ':f'), ['NoneType', 'nn.Module']),
    'no module of that name': (lambda s: s.prepare(model='nowhere.at_all:f'),
                               ['nowhere.at_all', 'importable']),
    'a folder of transformers that is none': (lambda s: s.prepare(
        model=f'transformers:{s.root}'), ['config.json', 'save_pretrained']),
    'options that are no JSON': (lambda s: s.prepare(options='{outputs: 3'),
                                 ['--options', 'JSON']),
    'options that the model has not': (lambda s: s.prepare(options='{"width": 3}'),
                                       ['width', 'net.py:make']),
    'a pickle': (lambda s: s.prepare(weights=pt(s)),
                 ['m.pt', 'python -c', 'weights_only=True', 'm.safetensors']),
    'no weights': (lambda s: s.prepare(weights=None), ['--weights']),
    'weights that are not there': (lambda s: s.prepare(weights='gone.safetensors'),
                                   ['gone.safetensors', 'no such']),
    'weights that are none': (lambda s: s.prepare(
        weights=s.file('x.safetensors', b'12345678 hi')), ['x.safetensors', 'is no']),
    'weights cut off': (lambda s: s.prepare(weights=s.file(
        'x.safetensors', Path(s.model['weights']).read_bytes()[:-99])),
        ['x.safetensors', 'Restore']),
    'a tensor is missing': (lambda s: s.prepare(weights=s.weights(drop('head.bias'))),
                            ['head.bias is missing', 'w.safetensors']),
    'a tensor too many': (lambda s: s.prepare(weights=s.weights(
        put('neck.bias', torch.ones(2)))), ['neck.bias is unknown']),
    'a tensor of another shape': (lambda s: s.prepare(weights=s.weights(
        put('head.bias', torch.ones(7)))), ['head.bias is [7]', '[3] in the model']),
    'a tensor with NaN': (lambda s: s.prepare(weights=s.weights(
        put('head.bias', torch.tensor([0., float('nan'), 1.])))), ['head.bias', 'NaN']),
    'probabilities': (lambda s: s.prepare(model=answering(
        s, 'self.head(self.body(x)).sigmoid()')), ['other.py', 'out its sigmoid']),
    'a batch norm without statistics': (lambda s: s.prepare(model=answering(
        s, 'self.head((z := self.body(x)) - z.mean(0))')), ['alone otherwise']),
    'a class number that is too long': (lambda s: s.prepare(
        table=s.with_line('age', '9' * 20)), ['9999', 'order']),
    'one file under two paths': (lambda s: s.prepare(table=s.with_line(
        'path', str(s.office / '..' / s.office.name / '0_1.png'))), ['second time']),
    'a kind of image that is not read': (lambda s: s.prepare(
        data=folder_of(s, 'train/a/2.heic')), ['2.heic', 'Save them as JPEG']),
    'an image of nobody': (lambda s: s.prepare(data=folder_of(s, 'train/x.jpg')),
                           ['x.jpg', 'in no folder of a person']),
    'no such table': (lambda s: s.prepare(data='gone.csv'), ['gone.csv', 'no such f']),
    'an empty table': (lambda s: s.prepare(table=s.table.iloc[:0]), ['no row']),
    'a table that is an image': (lambda s: s.prepare(data=s.file(
        'x.csv', b'\x89PNG\r\n\x1a\n\xff\xfe')), ['x.csv', 'UTF-8']),
    'a column is missing': (lambda s: s.prepare(table=s.table.drop(columns='identity')),
                            ['missing: identity', 'staff.csv']),
    'no target': (lambda s: s.prepare(table=s.table.drop(columns='age')), ['target']),
    'a row that is too long': (lambda s: s.prepare(data=s.file(
        'long.csv', 'path,identity,age\na.png,Ann,1,\nb.png,Bo,1,\n')),
        ['long.csv', 'same number of columns']),
    'an empty cell': (lambda s: s.prepare(table=s.with_line('age', '', 3)),
                      ['row 5', 'age is empty']),
    'an unknown split': (lambda s: s.prepare(table=s.with_line('split', 'dev', 2)),
                         ['row 4', '"dev"', 'train, val, test, portrait']),
    'a row twice': (lambda s: s.prepare(table=s.table.iloc[[0, 0, *range(1, 80)]]),
                    ['second time', '0_0.png']),
    'an image is missing': (lambda s: s.prepare(table=s.with_line('path', 'no.png')),
                            ['row 2', 'no.png', 'no such image']),
    'somebody on both sides': (lambda s: s.prepare(table=s.with_line(
        'identity', 'Ann Example 0', 79)), ['Ann Example 0', 'in train and in val']),
    'no strangers': (lambda s: s.prepare(table=s.table[s.table.split != 'val']),
                     ['0 people have split = val', 'Add some']),
    'one image a person': (lambda s: s.prepare(table=s.table[
        (s.table.split == 'val') | s.table.path.str.endswith('_1.png')]),
        ['more than one image', 'Add images']),
    'names of classes without an order': (lambda s: s.prepare(
        table=s.table.assign(age=s.table.age.map(dict(zip('012', 'xyz'))))),
        ['--classes', 'x, y, z']),
    'a class that the model has not': (lambda s: s.prepare(
        table=s.with_line('age', '3', 1)), ['row 3', '"3"', 'outputs 0…2']),
    'too few names of classes': (lambda s: s.prepare(classes='a,b'), ['2 classes']),
    'a class that no name fits': (lambda s: s.prepare(
        classes='a,b,c', table=s.table.assign(age='d')), ['"d"', 'a, b, c']),
    'an attribute that is neither': (lambda s: s.prepare(
        options='{"outputs": 4}', weights=model_of('function', s.office, 4)['weights'],
        table=pd.read_csv(s.office / 'attributes.csv', dtype=str).assign(a2='2')),
        ['a2 is "2"', '0 or 1']),
    'too many attributes': (lambda s: s.prepare(table=pd.read_csv(
        s.office / 'attributes.csv', dtype=str)), ['4 classes', '3 outputs']),
    'the classes are the people': (lambda s: s.prepare(
        options='{"outputs": 4}', weights=model_of('function', s.office, 4)['weights'],
        table=recogniser(s)),
                                   ['class of their own', 'right answer']),
    'an image that is broken': (lambda s: s.prepare(table=s.with_line(
        'path', s.file('broken.png', b'\x89PNG'))), ['broken.png', 'be decoded']),
    'no such method': (lambda s: s.prepare('--method', 'amnesia'),
                       ['"amnesia"', 'metastep']),
    'a method that needs the data': (lambda s: s.prepare('--method', 'scrub'),
                                     ['scrub', 'one-shot']),
    'a setting is missing': (lambda s: s.prepare('--method', 'neggrad'),
                             ['neggrad', 'lr is missing']),
    'a setting out of bounds': (lambda s: s.prepare('--set', 'requests=0'),
                                ['requests = 0']),
    'an unknown setting': (lambda s: s.prepare('--set', 'speed=3'), ['speed', 'Valid']),
    'a setting without value': (lambda s: s.prepare('--set', 'sizes'), ['NAME=VALUE']),
    'one request only': (lambda s: s.prepare('--requests', '1'), ['requests = 1']),
    'more people than there are': (lambda s: s.prepare('--people', '14'),
                                   ['two requests need 28', 'Ask for fewer']),
    'a std of zero': (lambda s: s.prepare('--std', '0'), ['std is above 0']),
    'two means': (lambda s: s.prepare('--mean', '.5', '.5'), ['one number each']),
    'an unknown interpolation': (lambda s: s.prepare('--interpolation', 'magic'),
                                 ['interpolation', 'magic']),
    'a recipe that is none': (lambda s: s.prepare('--recipe', '{"speed": 1}'),
                              ['recipe', 'speed', 'epochs']),
    'a kit is there already': (lambda s: s.prepare(kit=str(s.root / 'kit')),
                               ['kit: exists already', 'not overwritten']),
    'a folder without people': (lambda s: s.prepare(data=str(s.root / 'kit')),
                                ['train/PERSON']),
}

FORGET = {
    'no such kit': (lambda s: s.forget(kit='gone'), ['gone: is no kit']),
    'a kit with another promise': (lambda s: promise_more(s) or s.forget(),
                                   ['kit.json', 'was changed']),
    'a kit of another format': (lambda s: edit_kit(s, state_sha=7) or s.forget(),
                                ['kit.json', 'state_sha']),
    'a state of another kit': (lambda s: s.file('kit/state.safetensors', b'x') and
                               s.forget(), ['state.safetensors', 'Restore']),
    'no such portrait': (lambda s: s.forget('gone.jpg'), ['gone.jpg: no such file']),
    'a folder as portrait': (lambda s: s.forget(s.root), ['is a folder']),
    'an empty file': (lambda s: s.forget(s.file('e.jpg')), ['e.jpg', '0 bytes']),
    'a letter as portrait': (lambda s: s.forget(s.file('l.jpg', 'Dear Sir or Madam')),
                             ['l.jpg', 'cannot be decoded']),
    'a portrait cut off': (lambda s: s.forget(s.file('half.jpg', Path(s.image(
        'x.jpg')).read_bytes()[:500])), ['half.jpg', 'be decoded']),
    'a portrait of one colour': (lambda s: s.forget(s.image('red.png', Image.new(
        'RGB', (64, 64), 'red'))), ['red.png', 'same colour']),
    'a thumbnail': (lambda s: s.forget(s.image('t.png', Image.open(
        s.office / '0_0.png').resize((9, 9)))), ['t.png', '9 × 9']),
    'a strip': (lambda s: s.forget(s.image('s.png', grown(Image.open(
        s.office / '0_0.png')))), ['s.png', 'Cut the face out']),
    'brightness in floats': (lambda s: s.forget(s.image('f.tif', Image.fromarray(
        np.random.rand(40, 40).astype(np.float32)))), ['f.tif', 'floating-point']),
    'brightness in 32 bits': (lambda s: s.forget(s.image('i.tif', Image.fromarray(
        np.random.default_rng(0).integers(0, 2**31, (40, 40)).astype(np.int32)))),
        ['i.tif', '16 bits were expected']),
    'brightness in 12 bits': (lambda s: s.forget(s.image('d.png', Image.fromarray(
        np.arange(1600, dtype=np.uint16).reshape(40, 40)))),
        ['d.png', 'from 0 to 1599', '8 bits']),
    'an unknown label': (lambda s: s.forget(more=['--label', 'old']),
                         ['"old"', 'Valid: 0, 1, 2']),
    'more labels than portraits': (lambda s: s.forget(
        s.office / '0_0.png', s.office / '1_0.png', s.office / '2_0.png',
        more=['--label', '1', '--label', '2']), ['--label: 2 for 3']),
    'the same portrait twice': (lambda s: s.forget(
        s.office / '0_0.png', s.office / '0_0.png'), ['same picture']),
    'a check that is not there': (lambda s: s.forget(more=['--check', 'c.png']),
                                  ['c.png: no such file']),
    'out is no safetensors': (lambda s: s.forget(out='m2.pt'), ['m2.pt', '.saf']),
    'out is there already': (lambda s: s.file('m2.safetensors', b'mine') and s.forget(),
                             ['m2.safetensors: exists already']),
    'a report is there already': (lambda s: s.file('m2.report.html', b'mine') and
                                  s.forget(), ['m2.report.html: exists already']),
    'out is nowhere': (lambda s: s.forget(out='gone/m2.safetensors'),
                       ['gone: no such folder']),
    'the model was moved': (lambda s: edit_kit(s, weights='gone.safetensors') or
                            s.forget(), ['gone.safetensors', 'say --weights FILE']),
    'another model': (lambda s: s.forget(more=['--weights', s.weights(
        put('head.bias', torch.ones(3)))]), ['w.safetensors', 'is not the model']),
    'a pickle as the last model': (lambda s: s.forget(more=['--weights', pt(s)]),
                                   ['m.pt', 'python -c']),
    'a ledger that is none': (lambda s: s.file('kit/ledger.jsonl', 'hello\n') and
                              s.forget(), ['ledger.jsonl: line 1']),
}


def files_of(root):
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob('*'))
            if f.is_file() and f.name != '.lock'}


def tried(argv, says, scene, capsys):
    "One message, exit code 1, and every file as it was."
    before = files_of(scene.root)
    assert run(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith('oneshui: ') and 'Traceback' not in said
    for part in says: assert part in said, said
    assert files_of(scene.root) == before


@pytest.fixture
def scene(tmp_path, office, kit):   # noqa: F811
    return Scene(tmp_path, office, kit)


@pytest.mark.parametrize('wrong', PREPARE)
def test_prepare_says_what_is_wrong(wrong, scene, capsys, monkeypatch):
    "Before anything is learned."
    def never(*args): raise AssertionError('long work has begun')
    monkeypatch.setattr(preparing, 'learn', never)
    make, says = PREPARE[wrong]
    tried(make(scene), says, scene, capsys)


@pytest.mark.parametrize('wrong', FORGET)
def test_forget_says_what_is_wrong(wrong, scene, capsys):
    make, says = FORGET[wrong]
    tried(make(scene), says, scene, capsys)


def test_an_unknown_attribute(tmp_path, office, attribute_kit, capsys):  # noqa: F811
    scene = Scene(tmp_path, office, attribute_kit)
    argv = scene.forget(more=['--label', 'a1,beard'])
    tried(argv, ['beard', 'a0, a1, a2, a3'], scene, capsys)


def test_forty_kinds_at_least(): assert len(PREPARE) + len(FORGET) >= 40


HANDLED = {   # a portrait that is odd, and what the report says of it
    'cmyk.jpg': (lambda im: im.convert('CMYK'), 'converted from CMYK'),
    'deep.png': (lambda im: Image.fromarray(np.asarray(im.convert('L')).astype(
        np.uint16) * 257), '16 bits reduced to 8'),
    'palette.gif': (lambda im: im.convert('P'), 'converted from P'),
    'grey.png': (lambda im: im.convert('L'), ''),
    'alpha.png': (lambda im: im.convert('RGBA').rotate(20), 'put on white'),
    'large.png': (lambda im: im.resize((300, 400)), ''),
}


@pytest.mark.parametrize('name', HANDLED)
def test_odd_portraits_are_handled(name, scene):
    change, note = HANDLED[name]
    portrait = scene.image(name, change(Image.open(scene.office / '0_0.png')))
    assert run(scene.forget(portrait)) == 0
    report = json.loads((scene.root / 'm2.report.json').read_text())
    assert any(note in n for n in report['portraits'][0]['notes']) or not note


def test_a_turned_photograph_is_the_same_portrait(scene):
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.open(scene.office / '0_0.png').transpose(Image.Transpose.ROTATE_90)
    assert run(scene.forget()) == 0
    assert run(scene.forget(scene.image('lying.png', lying, exif=exif),
                            out='m3.safetensors')) == 1, 'forgotten already'
