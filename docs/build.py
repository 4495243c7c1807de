"""Lays out the site's sources as the repository has them, so that its links hold, and
runs Sphinx on them. Called by `make docs`; no notebook is executed: pages show the
committed outputs."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, SITE = ROOT / 'nbs', ROOT / 'build/docs'
SRC = SITE / 'source'


def directives(source):
    "What a cell says in lines `#| name: value`."
    said = re.findall(r'(?m)^#\|\s*([\w-]+):?[ \t]*(.*)$', source)
    return {name: value.strip() or 'true' for name, value in said}


def only_imports(source):
    "Whether a cell does nothing but import."
    try: body = ast.parse(source).body
    except SyntaxError: return False   # a cell with a magic
    return bool(body) and all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in body)


def draws(source, outputs):
    "Whether a cell is the code of a picture, and long."
    pictures = any('image/png' in o.get('data', {}) for o in outputs)
    plots = re.match(r'(@patch\n)?def (plot|draw|explore)_', source)
    return bool(plots) or pictures and len(source.splitlines()) > 12


def is_plumbing(source, said, tags, outputs):
    "Cells that open on a click: `#| code-fold`, parameters, imports, code of pictures."
    if 'code-fold' in said: return said['code-fold'] != 'false'
    return 'parameters' in tags or only_imports(source) or draws(source, outputs)


def alternative(said, outputs):
    "A picture's alternative text: `#| fig-alt:`, or what the output says of itself."
    pictures = [o['data'] for o in outputs if 'image/png' in o.get('data', {})]
    texts = [''.join(d.get('text/plain', '')) for d in pictures]
    described = [t for t in texts if not t.startswith('<')]
    return said.get('fig-alt') or next(iter(described), None)


def code_cell(cell):
    "A cell without directives, its picture described, folded or (None) left out."
    source, tags = ''.join(cell['source']), list(cell['metadata'].get('tags', []))
    said = directives(source)
    if {'hide', 'default_exp'} & {*said}: return None
    source = re.sub(r'(?m)^#\|.*\n?', '', source).strip('\n')
    if not source: return None
    if is_plumbing(source, said, tags, cell['outputs']): tags.append('hide-input')
    alt = alternative(said, cell['outputs'])
    image = dict(mystnb=dict(image=dict(alt=alt))) if alt else {}
    return cell | dict(source=source, metadata=dict(tags=tags) | image)


def notebook(path, out):
    "A notebook as the site shows it; a chapter's title begins with its number."
    nb = json.loads(path.read_text())
    shown = (code_cell(c) if c['cell_type'] == 'code' else c for c in nb['cells'])
    nb['cells'] = list(filter(None, shown))
    if path.stem[:2].isdigit():
        first = nb['cells'][0]
        title = f'# {int(path.stem[:2])} · '
        first['source'] = re.sub(r'\A# ', title, ''.join(first['source']))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(nb))


def notebooks():
    found = (p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    return sorted(p for p in found if p != NBS / 'index.ipynb')   # README is the index


def told_in():
    "module -> the notebook that exports it."
    module = lambda p: re.search(r'#\| ?default_exp (\w+)', p.read_text())
    found = {p.relative_to(ROOT).as_posix(): module(p) for p in notebooks()}
    return {m[1]: book for book, m in found.items() if m}


def toctree(pages, caption=''):
    "MyST's table of contents: in the sidebar under a caption, or on the page."
    head = f':hidden:\n:caption: {caption}\n' if caption else ':maxdepth: 2\n'
    return f'```{{toctree}}\n{head}\n' + '\n'.join(pages) + '\n```\n'


def reference(modules):
    "A page for each module, filled by sphinx.ext.autodoc."
    (SRC / 'reference').mkdir()
    for name, book in modules.items():
        page = (f'# oneshui.{name}\n\nTold in [](../{book}).\n\n```{{eval-rst}}\n'
                f'.. automodule:: oneshui.{name}\n   :members:\n```\n')
        (SRC / f'reference/{name}.md').write_text(page)
    index = ['# Reference', 'Modules, exported from the notebooks that tell them.',
             toctree(sorted(modules))]
    (SRC / 'reference/index.md').write_text('\n\n'.join(index))


def front_page():
    "README, and the site's table of contents."
    books = [p.relative_to(ROOT).with_suffix('').as_posix() for p in notebooks()]
    tools = [b for b in books if b.startswith('nbs/api/')]
    chapters = [b for b in books if b not in tools]
    look_up = ('docs/own-model docs/claims-and-limits docs/glossary reference/index '
               'docs/contributing docs/references').split()
    trees = dict(Chapters=chapters, Tools=tools) | {'Look up': look_up}
    contents = (toctree(pages, caption) for caption, pages in trees.items())
    page = '\n'.join([(ROOT / 'README.md').read_text(), *contents])
    (SRC / 'index.md').write_text(page)


def lay_out():
    for old in (SRC, SITE / 'html'): shutil.rmtree(old, ignore_errors=True)
    python = shutil.ignore_patterns('*.py', '__pycache__')
    for folder in ('docs', 'figures/published', 'oneshui/presets'):
        shutil.copytree(ROOT / folder, SRC / folder, ignore=python)
    for p in notebooks(): notebook(p, SRC / p.relative_to(ROOT))
    reference(told_in())
    front_page()


def run_sphinx():
    "Warnings are errors. The package that is documented is this checkout's."
    options = '-b html -W --keep-going -q -j auto -c'.split()
    path = [str(ROOT), str(ROOT / 'docs'), os.environ.get('PYTHONPATH', '')]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(path))
    sphinx = [sys.executable, '-m', 'sphinx', *options, ROOT / 'docs']
    return subprocess.run([*sphinx, SRC, SITE / 'html'], env=env).returncode


if __name__ == '__main__':
    lay_out()
    sys.exit(run_sphinx())
