"""What is generated is what was committed: the package from the notebooks, the README from the index, notebooks clean."""
import json, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').rglob('*.ipynb'))
BIN = Path(sys.executable).parent


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what the generators read and write."
    d = tmp_path_factory.mktemp('sync')
    for name in ('nbs', 'oneshui'):
        shutil.copytree(ROOT / name, d / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copytree(ROOT / 'figures/mini', d / 'figures/mini')
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md'):
        shutil.copy(ROOT / name, d / name)
    return d


def test_export_is_in_sync(copy):
    subprocess.run([BIN / 'nbdev_export'], cwd=copy, check=True, capture_output=True)
    for f in (ROOT / 'oneshui').glob('*.py'):
        assert (copy / 'oneshui' / f.name).read_text() == f.read_text(), f'{f.name} differs from its notebook: run make export'


def test_every_module_has_a_notebook():
    exported = {
        l.split()[2]
        for n in NOTEBOOKS
        for c in json.loads(n.read_text())['cells']
        for l in c['source']
        if l.startswith('#| default_exp')
    }
    assert exported == {f.stem for f in (ROOT / 'oneshui').glob('*.py') if not f.stem.startswith('_')}


def test_notebooks_are_clean(copy):
    subprocess.run([BIN / 'nbdev_clean'], cwd=copy, check=True, capture_output=True)
    for n in NOTEBOOKS:
        assert (copy / n.relative_to(ROOT)).read_text() == n.read_text(), f'{n.name} is not clean: run nbdev_clean'


def test_notebooks_carry_their_outputs_and_no_noise():
    for n in NOTEBOOKS:
        cells = [c for c in json.loads(n.read_text())['cells'] if c['cell_type'] == 'code']
        outputs = [o for c in cells for o in c['outputs']]
        assert outputs, f'{n.name} has no outputs'
        for o in outputs:
            assert o['output_type'] != 'error', f'{n.name}: {o.get("evalue")}'
            assert o.get('name') != 'stderr', f'{n.name}: {"".join(o["text"])[:200]}'
            assert 'application/vnd.jupyter.widget-view+json' not in o.get(
                'data', {}
            ), f'{n.name}: a widget that no reader can see: run python docs/clean.py'


def test_parameters_tag_survives():
    for n in NOTEBOOKS:
        cells = json.loads(n.read_text())['cells']
        if any('preset = ' in ''.join(c['source'])[:20] for c in cells):
            assert any('parameters' in c['metadata'].get('tags', []) for c in cells), n.name


def test_readme_comes_from_the_index(copy):
    subprocess.run([BIN / 'jupyter', 'nbconvert', '--log-level', 'ERROR', '--to', 'markdown', '--TagRemovePreprocessor.enabled=True', '--TagRemovePreprocessor.remove_input_tags=remove-input',
                    '--output-dir', '.', '--output', 'README.md', 'nbs/index.ipynb'], cwd=copy, check=True, capture_output=True)
    assert (copy / 'README.md').read_text() == (ROOT / 'README.md').read_text(), 'run make readme'


def test_index_shows_the_committed_table():
    table = (ROOT / 'figures/mini/table1_celebahq.md').read_text().strip()
    assert table in (ROOT / 'README.md').read_text(), 'README.md shows another table than figures/mini: run make notebooks'
