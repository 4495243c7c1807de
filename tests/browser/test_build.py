"""The build: what it refuses, what it folds, where it links. `make test-browser`."""
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
build = runpy.run_path(str(ROOT / 'docs/build.py'), run_name='build')
conf = runpy.run_path(str(ROOT / 'docs/conf.py'), run_name='conf')
CONF = "extensions = ['myst_nb', 'pages']\nmyst_enable_extensions = ['dollarmath']\n"


def sphinx(folder, page):
    "Build a site of one page as strictly as ours; what Sphinx complains about."
    (folder / 'conf.py').write_text(CONF)
    (folder / 'index.md').write_text(f'# A page\n\n{page}\n')
    command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '.', 'out']
    env = os.environ | dict(PYTHONPATH=str(ROOT / 'docs'))
    r = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert (r.returncode == 0) == (not r.stderr), r.stderr
    return r.stderr


@pytest.mark.parametrize('page', [r'$\theta_{{term}`Retrain <Retrain>`}$',
                                  r'$$\theta_{[Retrain](glossary.md)}$$',
                                  'From $$ to \\theta, a formula that nobody closed.'])
def test_markup_inside_maths_fails_the_build(tmp_path, page):
    assert 'formula' in sphinx(tmp_path, page)


def test_a_formula_builds(tmp_path):
    tow = r'$$\text{ToW} = \prod_d (1 - |s_d(\theta_u)|)$$'
    assert not sphinx(tmp_path, f'{tow} and $x < y$')


def test_terms_and_names_do_not_touch_formulas_or_code(tmp_path):
    glossary = '```{glossary}\nRetrain\n    The yardstick.\n```\n'
    page = 'The Retrain of `Retrain` and $s_{Retrain}$, Retrain again.\n\n' + glossary
    assert not sphinx(tmp_path, page)
    html = (tmp_path / 'out/index.html').read_text()
    assert html.count('href="#term-Retrain"') == 2, 'one link, and the permanent link'
    assert '<span class="pre">Retrain</span>' in html and 's_{Retrain}' in html


@pytest.mark.parametrize('source, folded', [
    ('import torch\nfrom oneshui.data import Faces', True),
    ('import torch\nx = torch.ones(2)', False),
    ('def plot_walk(walk): ...', True),
    ('def plan(walk): ...', False),
    ('#| code-fold: true\nx = 1', True),
    ('#| code-fold: false\nimport torch', False),
    ('%matplotlib inline', False),
])
def test_what_is_folded(source, folded):
    cell = dict(cell_type='code', source=source, outputs=[], metadata={})
    assert ('hide-input' in build['code_cell'](cell)['metadata']['tags']) == folded


@pytest.mark.parametrize('lines, folded', [(13, True), (12, False)])
def test_long_code_of_a_picture_is_folded(lines, folded):
    outputs = [dict(data={'image/png': '', 'text/plain': '<Figure>'})]
    cell = dict(source='\n'.join(['plot()'] * lines), outputs=outputs, metadata={})
    assert ('hide-input' in build['code_cell'](cell)['metadata']['tags']) == folded


def test_a_picture_is_described_and_hidden_cells_are_left_out():
    picture = dict(data={'image/png': '', 'text/plain': '<Figure>'})
    cell = dict(source='#| fig-alt: A line.\nplot()', outputs=[picture], metadata={})
    made = build['code_cell'](cell)
    assert made['source'] == 'plot()'
    assert made['metadata']['mystnb']['image']['alt'] == 'A line.'
    for said in ('#| default_exp core', '#| hide\nx = 1'):
        assert build['code_cell'](dict(source=said, outputs=[], metadata={})) is None


@pytest.mark.parametrize('remote, host', [
    ('git@github.com:me/oneshui.git', 'https://github.com/me/oneshui'),
    ('https://gitlab.com/lab/group/oneshui', 'https://gitlab.com/lab/group/oneshui'),
    ('https://me:secret@github.com/me/oneshui.git', 'https://github.com/me/oneshui'),
    ('/srv/git/oneshui', None), ('', None), ('../oneshui', None),
])
def test_links_to_the_host_come_from_the_remote(remote, host):
    assert conf['hosted_at'](remote) == host


def test_chapters_carry_their_numbers(tmp_path):
    book = ROOT / 'nbs/03_metaunlearn.ipynb'
    build['notebook'](book, tmp_path / book.name)
    first = json.loads((tmp_path / book.name).read_text())['cells'][0]['source']
    assert ''.join(first).startswith('# 3 · ')
