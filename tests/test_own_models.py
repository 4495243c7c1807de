"""Networks as people have them: how they answer, where they lie, what they are fed."""
import json
import unicodedata

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models

from oneshui.core import DataError, PresetError
from oneshui.data import Faces
from oneshui.handlers import (Preprocessing, _processor, from_anywhere, from_timm,
                              from_transformers, logits_in, open_model, outputs_in,
                              preprocessing)
from oneshui.ledger import salted
from oneshui.preparing import check_chooser, rounded

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
