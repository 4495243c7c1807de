import os

os.environ.setdefault('ONESHUI_PROGRESS', 'off')

import pytest
import torch

from oneshui.portraits import write_portraits
from oneshui.presets import load_preset
from oneshui.runs import RunStore

torch.set_num_threads(1)   # two workers on two cores
LONGEST = ('test_tables', 'test_notebooks', 'test_runs', 'test_ranks', 'test_desk',
           'test_metastep', 'test_benchmarks', 'test_cluster')   # start first


def pytest_collection_modifyitems(items):
    place = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda i: place.get(i.path.stem, len(place)))


@pytest.fixture(scope='session')
def smoke():
    return load_preset('smoke')


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory, smoke):
    return write_portraits(tmp_path_factory.mktemp('data'), **smoke.portraits, n_jobs=1)


@pytest.fixture(scope='session')
def shared(tmp_path_factory, data_dir):
    "One store for tests that only add to it."
    return RunStore(tmp_path_factory.mktemp('shared'), data_dir)
