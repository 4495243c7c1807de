"""Networks as people have them: how they answer, where they lie, what they are fed."""
import json
import unicodedata

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from oneshui.cli import apart
from oneshui.core import DataError, PresetError
from oneshui.data import Faces, make_faces
from oneshui.handlers import (Preprocessing, _processor, from_anywhere, from_timm,
                              from_transformers, logits_in, named_as, names_in,
                              open_model, outputs_in, preprocessing, read_weights,
                              write_weights)
from oneshui.inspection import codes_of
from oneshui.ledger import salted
from oneshui.photos import People, Photos, copies, read_folder, read_people
from oneshui.preparing import check_chooser, rounded
from oneshui.rehearsal import draw_plays
from oneshui.reports import write_report

SMALL = '''
import torch
from torch import nn
class Net(nn.Module):
    preprocessing = dict(size=(8, 8), mean=(.5,) * 3, std=(.5,) * 3)
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 3)
        self.register_buffer('mask', torch.full((2, 2), -torch.inf).triu(1))
    def forward(self, x): return {}
def make(): return Net()
'''
Z = 'self.head(input=x.flatten(1))'   # called by name


def written(folder, answer, file='net.py', source=SMALL):
    "A file with a network, and its weights."
    (folder / file).write_text(source.format(answer) if '{}' in source else source)
    mask = torch.full((2, 2), -torch.inf).triu(1)   # as attention has it
    tensors = {'head.weight': torch.randn(3, 192), 'head.bias': torch.zeros(3)}
    save_file(tensors | dict(mask=mask), folder / 'w.safetensors')
    return f'{folder / file}:make', folder / 'w.safetensors'


@pytest.mark.parametrize('answer', [
    Z, f'dict(logits={Z})', f'({Z}, None)', f'(({Z}), {Z}) if self.training else {Z}'])
def test_answers_that_hold_logits(tmp_path, answer):
    model = open_model(*written(tmp_path, answer))[1]
    x = torch.randn(4, 3, 8, 8)
    for mode in (model.eval(), model.train()): assert mode(x).shape == (4, 3)
    assert model.eval().forward_features(x).shape == (4, 3 + 192), 'and what feeds them'


def test_probabilities_are_no_logits(tmp_path):
    with pytest.raises(PresetError, match='softmax'):
        open_model(*written(tmp_path, f'{Z}.softmax(1)'))
    assert logits_in(None) is None and logits_in(()) is None


def test_a_file_finds_its_neighbours_from_anywhere(tmp_path, monkeypatch):
    written(tmp_path, Z, 'blocks_of_mine.py')
    name, weights = written(tmp_path, '', 'net.py', 'from blocks_of_mine import make\n')
    monkeypatch.chdir(tmp_path)
    source = open_model('net.py:make', weights)[0]
    assert source.name == name == from_anywhere('net.py:make')
    monkeypatch.chdir('/')
    assert source.load(weights)(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    assert from_anywhere('timm:resnet18') == 'timm:resnet18'


def test_preprocessing_is_of_pixels_from_0_to_1():
    with pytest.raises(ValueError, match='divide by 255'):
        Preprocessing(size=(8, 8), mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    grey = from_timm('test_resnet', dict(in_chans=1), 3)[1]
    assert len(grey['mean']) == len(grey['std']) == 1


@pytest.mark.parametrize('edge, expected', [
    (224, dict(size=(224, 224), resize=256)),
    (384, dict(size=(384, 384), resize=None))])
def test_a_processor_that_cuts_a_share(tmp_path, edge, expected):
    T = pytest.importorskip('transformers')
    T.ConvNextConfig(depths=[1, 1], hidden_sizes=[8, 8], num_stages=2,
                     id2label={0: 'a', 1: 'b'}).save_pretrained(tmp_path)
    said = dict(size=dict(shortest_edge=edge), crop_pct=.875, resample=3)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(said))
    found = from_transformers(str(tmp_path), {}, None)[1]
    assert {k: found[k] for k in expected} == expected


@pytest.mark.parametrize('name, net', [
    ('torchvision:squeezenet1_1', lambda: models.squeezenet1_1(num_classes=3)),
    ('timm:dla46x_c', lambda: timm.create_model('dla46x_c', num_classes=3))])
def test_a_head_of_1_by_1_says_how_many(name, net):
    assert outputs_in(net().state_dict(), name, {}) == 3


@pytest.mark.parametrize('kind, said', [
    ('ViT', {}), ('EfficientNet', {}), ('EfficientNet', dict(
        rescale_factor=1 / 127.5, rescale_offset=True, include_top=False)),
    ('ViT', dict(do_rescale=False, image_mean=[120.] * 3, image_std=[60.] * 3)),
    ('ViT', dict(do_normalize=False))], ids=str)
def test_pixels_are_those_of_the_processor(tmp_path, kind, said):
    T = pytest.importorskip('transformers')
    edge = dict(size=dict(height=24, width=24))
    theirs = getattr(T, f'{kind}ImageProcessor')(**edge | said)
    theirs.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(
        0, 256, (24, 24, 3), dtype='uint8'))
    prep = preprocessing(_processor(tmp_path), {})
    ours = prep.normalised(torch.tensor(prep.pixels(image))[None])
    expected = theirs(image, return_tensors='pt')['pixel_values']
    assert torch.allclose(ours, expected, atol=1e-5)


def test_a_processor_of_grey_images(tmp_path):
    said = dict(size=24, image_mean=[.1], image_std=[.3], do_rescale=True)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(said))
    found = _processor(tmp_path)
    assert (found['mean'], found['std']) == ([.1], [.3])


def test_blue_before_red_is_refused(tmp_path):
    said = dict(do_flip_channel_order=True)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(said))
    with pytest.raises(PresetError, match='module:function'): _processor(tmp_path)


@pytest.mark.parametrize('name', ['module.head', '_orig_mod.module.head'])
def test_what_a_wrapper_put_before_names_goes_and_the_own_stays(tmp_path, name):
    model, weights = written(tmp_path, Z)
    tensors = {f'{name}.weight': torch.randn(3, 192), f'{name}.bias': torch.zeros(3)}
    tensors[name.replace('head', 'mask')] = torch.full((2, 2), -torch.inf).triu(1)
    save_file(tensors, weights)
    if name == 'module.head':   # the network itself is called so, too
        own = SMALL.replace('self.head = nn.Linear(192, 3)',
                            'self.module = nn.Module(); '
                            'self.module.head = nn.Linear(192, 3)')
        own = own.replace("self.register", "self.module.register")
        found = written(tmp_path, 'self.module.head(x.flatten(1))', 'own.py', own)[0]
        save_file(tensors, weights)
        assert open_model(found, weights)[0].outputs == 3
    assert open_model(model, weights)[0].outputs == 3


def test_a_function_may_import_its_neighbours_late(tmp_path, monkeypatch):
    written(tmp_path, Z, 'late_blocks.py')
    name, weights = written(tmp_path, '', 'late.py', (
        'def make():\n    from late_blocks import make\n    return make()\n'))
    monkeypatch.chdir('/')
    assert open_model(name, weights)[0].outputs == 3


def table_of(folder, rows):
    "A CSV of (who, label, split), and its images."
    for k in range(len(rows)):
        Image.new('RGB', (20, 20), (k, 200, 9)).save(folder / f'{k}.png')
    lines = ['path,identity,label,split']
    lines += [f'{k}.png,{",".join(r)}' for k, r in enumerate(rows)]
    (folder / 't.csv').write_text('\n'.join(lines))
    return folder / 't.csv'


def test_a_recogniser_whose_strangers_share_a_label_is_one(tmp_path):
    known = [(who, y, 'train') for who, y in ('a0', 'b1', 'c2') for _ in range(2)]
    strangers = [('d', '0', 'val'), ('e', '0', 'val')]
    with pytest.raises(DataError, match='each of 3 people is a class'):
        read_people(table_of(tmp_path, known + strangers), 3)
    shared = [(w, '0' if w == 'c' else y, s) for w, y, s in known]
    people = read_people(table_of(tmp_path, shared + strangers), 3)
    assert len(draw_plays(people, 9, 1, 0)) == 3
    with pytest.raises(DataError, match='need 4'): draw_plays(people, 9, 2, 0)
    one = [*shared, ('a', '0', 'portrait'), *strangers]   # nobody else has one
    plays = draw_plays(read_people(table_of(tmp_path, one), 3), 9, 1, 0)
    assert len(plays) == 3, 'one portrait does not send the others home'


def test_one_image_under_two_names(tmp_path):
    t = table_of(tmp_path, [('a', '0', 'train')] * 2 + [('b', '0', 'val')] * 2)
    t.write_text(t.read_text().replace('1.png', './0.png'))
    with pytest.raises(DataError, match='for the second time'): read_people(t, 2)


def test_a_person_called_test_is_not_lost_with_the_others(tmp_path):
    for who in ('anna', 'test'):
        (tmp_path / who).mkdir()
        Image.new('RGB', (20, 20)).save(tmp_path / who / '0.png')
    with pytest.raises(DataError, match='anna: lies beside'): read_folder(tmp_path)


def test_a_file_gets_back_the_names_it_had(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    own = net.state_dict()
    for before in ('', 'module.', '_orig_mod.module.'):
        names = {before + k for k in own}
        again = named_as(net, names)
        assert {*again} == names
        assert all(torch.equal(again[before + k], v) for k, v in own.items())
    few = {k for k in own if 'num_batches' not in k}   # an older torch
    assert {*named_as(net, few)} == few
    assert {*named_as(net, {'other'})} == {*own}
    write_weights(own, tmp_path / 'w.safetensors')
    assert names_in(tmp_path / 'w.safetensors') == {*own}


def test_a_transformer_is_written_as_it_was_saved(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
        intermediate_size=16, patch_size=8, num_labels=3)
    half = transformers.ViTForImageClassification(config).to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(dict(size=16)))
    _, model, _, path = open_model(f'transformers:{tmp_path}', None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}, 'of small steps'
    written = named_as(model.net, names_in(path))
    assert {*written} == names_in(path)
    assert all(torch.equal(v, read_weights(path)[k]) for k, v in written.items())


def test_people_are_the_same_in_either_unicode(tmp_path):
    e, é = (unicodedata.normalize(f, 'Zoé') for f in ('NFD', 'NFC'))
    rows = [(who, '0', 'train') for who in (e, 'b') for _ in range(2)]
    t = table_of(tmp_path, [*rows, (é, '1', 'val'), ('d', '0', 'val')])
    with pytest.raises(DataError, match='in train and in val'): read_people(t, 2)


def test_more_images_than_memory_are_looked_at_all_the_same(tmp_path):
    rows = [(who, '0', s) for who, s in (('a', 'train'), ('b', 'val')) for _ in '12']
    t = pd.read_csv(table_of(tmp_path, rows))
    faces = make_faces('t', tmp_path, t.path, t.identity, t.label.to_numpy(),
                       'multiclass', ['0'])
    prep = Preprocessing(size=(8, 8))
    photos, kept = Photos(faces, prep, most=0), Photos(faces, prep)
    assert photos.map is None and kept.map is not None
    rows = torch.arange(4).numpy()
    assert torch.equal(photos.batch(rows), kept.batch(rows))
    (tmp_path / '3.png').write_bytes(b'no image')
    with pytest.raises(DataError, match='3.png'): Photos(faces, prep, most=0)


def test_copies_of_train_among_strangers_are_found(tmp_path):
    rows = [(who, '0', s) for who, s in (('a', 'train'), ('b', 'train'), ('c', 'val'),
                                         ('d', 'val')) for _ in '12']
    t = table_of(tmp_path, rows)
    assert not len(copies(read_people(t, 2)))
    (tmp_path / '5.png').write_bytes((tmp_path / '1.png').read_bytes())
    assert copies(read_people(t, 2)).tolist() == [5]


def test_turned_training_images_are_counted(tmp_path):
    t = pd.read_csv(table_of(tmp_path, [('a', '0', 'train')] * 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / '0.png').save(tmp_path / '0.png', exif=exif)
    faces = make_faces('t', tmp_path, t.path, t.identity, t.label.to_numpy(),
                       'multiclass', ['0'])
    assert Photos(faces, Preprocessing(size=(8, 8))).notes == {
        'turned as its EXIF says': 1}


def test_a_report_holds_no_nan(tmp_path):
    write_report(dict(a=[float('nan'), 1.5], b=float('inf')), '',
                 tmp_path / '.m.report.json.part')
    said = (tmp_path / '.m.report.json.part').read_text()
    assert json.loads(said) == dict(a=[None, 1.5], b=None)


def test_a_full_disk_is_an_error_of_the_disk(tmp_path):
    with pytest.raises(OSError): write_weights(dict(a=torch.ones(1)), tmp_path / 'no/f')


def test_names_with_commas():
    assert apart(['a, b']) == ['a', 'b'] and apart(['a, b', 'c']) == ['a, b', 'c']
    faces = Faces('f', None, [], torch.tensor([0, 0, 1, 2]).numpy(),
                  np.array(['Doe, J', 'K', 'L']), None, 'multiclass', ['a'])
    people = People(faces, np.array(['train'] * 4), False)
    assert codes_of(['Doe, J'], people, 'f').tolist() == [0]
    assert codes_of(['K,L'], people, 'f').tolist() == [1, 2]


def test_a_name_is_the_same_however_it_is_written():
    e = unicodedata.normalize('NFD', 'José')
    assert e != 'José' and salted(e, 's') == salted(' JOSÉ ', 's')
    assert salted(e, 's') != salted('Jose', 's')


def test_a_tiny_step_is_not_nothing():
    assert rounded(1.23456789e-9) == 1.23457e-9
    assert rounded(3) == 3 and rounded('a') == 'a'


def test_no_epoch_is_chosen_where_there_is_no_score():
    y = torch.tensor([[1., 0.], [0., 0.], [0., 0.]]).numpy()
    rows = torch.arange(3).numpy()
    faces = Faces('f', None, rows, rows, rows, y, 'multilabel', ['a', 'b'])
    check_chooser(faces, rows)
    with pytest.raises(DataError, match='--retrain'): check_chooser(faces, rows[1:])


@pytest.mark.parametrize('said', [
    dict(size=dict(longest_edge=32)), dict(size=32, resample=4),
    dict(size=32, resample=None)], ids=str)
def test_what_a_processor_does_otherwise_is_asked_for(tmp_path, said):
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(said))
    found = _processor(tmp_path)
    with pytest.raises(PresetError, match='--size'): preprocessing(found, {})
    assert preprocessing(found, dict(size=8)).size == (8, 8)
