"""What is generated is what was committed: the package from the notebooks, the README
from the index, the index from published results; notebooks are clean and have outputs.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb')
                   if '.ipynb_checkpoints' not in p.parts)
WIDGET = 'application/vnd.jupyter.widget-view+json'
READABLE = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), *NOTEBOOKS]


def cells(notebook): return json.loads(notebook.read_text())['cells']


def prose(file):
    "What a reader of a notebook or a Markdown file reads, and the outputs."
    if file.suffix == '.md': return file.read_text()
    said = [''.join(c['source']) for c in cells(file) if c['cell_type'] == 'markdown']
    outputs = [o for c in cells(file) for o in c.get('outputs', ())]
    tables = [''.join(o.get('data', {}).get('text/markdown', '')) for o in outputs]
    return '\n'.join(said + tables)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of what the generators read and write."
    d = tmp_path_factory.mktemp('sync')
    junk = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for name in ('nbs', 'oneshui'): shutil.copytree(ROOT / name, d / name, ignore=junk)
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md', 'Makefile'):
        shutil.copy(ROOT / name, d / name)
    return d


def run(*command, cwd):
    subprocess.run(command, cwd=cwd, check=True, capture_output=True)


def test_export_is_in_sync(copy):
    run(BIN / 'nbdev_export', cwd=copy)
    made = {f.name: f.read_text() for f in (copy / 'oneshui').glob('*.py')}
    kept = {f.name: f.read_text() for f in (ROOT / 'oneshui').glob('*.py')}
    differ = sorted(n for n in {*made, *kept} if made.get(n) != kept.get(n))
    assert not differ, f'{differ} differ from their notebooks: run make export'


def test_every_module_has_a_notebook():
    lines = [line for n in NOTEBOOKS for c in cells(n) for line in c['source']]
    told = [line.split()[2] for line in lines if line.startswith('#| default_exp')]
    assert sorted(told) == sorted(f.stem for f in (ROOT / 'oneshui').glob('[!_]*.py'))


def test_notebooks_are_clean(copy):
    run(BIN / 'nbdev_clean', cwd=copy)
    for n in NOTEBOOKS:
        cleaned = (copy / n.relative_to(ROOT)).read_text()
        assert cleaned == n.read_text(), f'{n.name} is not clean: run nbdev_clean'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda n: n.stem)
def test_a_notebook_carries_its_outputs_and_no_noise(notebook):
    outputs = [o for c in cells(notebook) for o in c.get('outputs', ())]
    assert outputs, 'no outputs: run make notebooks'
    for o in outputs:
        assert o['output_type'] != 'error', o.get('evalue')
        assert o.get('name') != 'stderr', ''.join(o['text'])[:200]
        assert WIDGET not in o.get('data', {}), 'a live view: run python docs/clean.py'


def test_parameters_tag_survives():
    for n in NOTEBOOKS:
        tagged = ['parameters' in c['metadata'].get('tags', ()) for c in cells(n)]
        sets = [''.join(c['source']).startswith('preset = ') for c in cells(n)]
        assert tagged == sets, f'{n.name}: papermill needs the tag `parameters`'


def test_readme_comes_from_the_index(copy):
    flags = '--to markdown --TagRemovePreprocessor.enabled=True --output-dir . --output'
    hidden = '--TagRemovePreprocessor.remove_input_tags=remove-input'
    run(BIN / 'jupyter', 'nbconvert', '--log-level', 'ERROR', hidden, *flags.split(),
        'README.md', 'nbs/index.ipynb', cwd=copy)
    assert (copy / 'README.md').read_text() == (ROOT / 'README.md').read_text(), \
        'run make readme'


def test_the_index_was_executed_on_the_published_results():
    "Executed again, it shows the same tables."
    from nbclient import NotebookClient
    from nbformat import read
    nb = read(ROOT / 'nbs/index.ipynb', as_version=4)
    shown = [c.outputs for c in nb.cells if c.cell_type == 'code']
    here = dict(metadata=dict(path=ROOT))
    NotebookClient(nb, kernel_name='python3', resources=here).execute()
    texts = lambda outputs: [o.data['text/markdown'] for o in outputs if 'data' in o]
    again = [c.outputs for c in nb.cells if c.cell_type == 'code']
    assert list(map(texts, shown)) == list(map(texts, again)), 'run make notebooks'


@pytest.mark.parametrize('file', READABLE, ids=lambda f: f.stem)
def test_links_lead_to_files_that_are_there(file):
    "README is shown from the root, and is the index; everything else from its folder."
    home = ROOT if file.stem in ('README', 'index') else file.parent
    targets = re.findall(r'\]\(([^)\s#]+)(?:#[^)]*)?\)', prose(file))
    local = [t for t in targets if re.fullmatch(r'[\w./-]+\.\w+', t)]
    assert not [t for t in local if not (home / t).exists()]


@pytest.mark.parametrize('file', READABLE, ids=lambda f: f.stem)
def test_no_page_names_a_host_of_the_repository(file):
    "Where it lives is known to the checkout (`git remote`) and docs/conf.py, not here."
    ours = r'git(hub|lab)\.(com|io)/oneshui|mybinder\.org|colab\.research'
    assert not re.search(ours, prose(file))


def test_results_of_users_are_ignored_and_published_ones_are_not():
    ignored = lambda path: subprocess.run(['git', 'check-ignore', '-q', path], cwd=ROOT)
    assert ignored('figures/mini/tow.png').returncode == 0
    assert ignored('figures/published/mini/tow.png').returncode == 1
    assert ignored('runs/x/spec.json').returncode == 0
