"""Lays out the site's sources in build/docs/source as the repository has them, so that its links hold, and runs Sphinx on them.
Called by `make docs`; no notebook is executed: pages show the committed outputs."""
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / 'build/docs'
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


def is_plumbing(source, said, tags):
    "Cells that a reader opens when they want to: `#| code-fold`, parameters, imports, the code of pictures."
    if 'code-fold' in said: return said['code-fold'] != 'false'
    draws = re.match(r'def (_?plot|_?draw|explore)_?', source)
    return 'parameters' in tags or only_imports(source) or bool(draws)


def alternative(said, outputs):
    "A picture's alternative text: `#| fig-alt:`, or what the output says of itself."
    pictures = [o['data'] for o in outputs if 'image/png' in o.get('data', {})]
    texts = [''.join(d.get('text/plain', '')) for d in pictures]
    return said.get('fig-alt') or next((t for t in texts if not t.startswith('<')), None)


def code_cell(cell):
    "A code cell without directives, its picture described, folded if it is plumbing; None if it is hidden."
    source = ''.join(cell['source'])
    said, tags = directives(source), list(cell['metadata'].get('tags', []))
    if {'hide', 'default_exp'} & {*said}: return None
    source = re.sub(r'(?m)^#\|.*\n?', '', source).strip('\n')
    if is_plumbing(source, said, tags): tags.append('hide-input')
    meta = dict(tags=tags)
    if alt := alternative(said, cell['outputs']): meta['mystnb'] = dict(image=dict(alt=alt))
    return cell | dict(source=source, metadata=meta) if source else None


def notebook(path, out):
    "A notebook as the site shows it; a chapter's title begins with its number."
    nb = json.loads(path.read_text())
    cells = [code_cell(c) if c['cell_type'] == 'code' else c for c in nb['cells']]
    nb['cells'] = [c for c in cells if c]
    if path.stem[:2].isdigit():
        title = ''.join(nb['cells'][0]['source'])
        nb['cells'][0]['source'] = re.sub(r'\A# ', f'# {int(path.stem[:2])} · ', title)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(nb))


def told_in():
    "module -> the notebook that exports it, in the order of the notebooks."
    books = [p.relative_to(ROOT) for p in sorted((ROOT / 'nbs').rglob('*.ipynb'))]
    found = [(re.search(r'#\| ?default_exp (\w+)', (ROOT / p).read_text()), p) for p in books]
    return {m[1]: p for m, p in found if m}


def reference(modules):
    "A page a module, filled by sphinx.ext.autodoc."
    (SRC / 'reference').mkdir()
    for name, book in modules.items():
        text = (f'# oneshui.{name}\n\nTold in [](../{book.as_posix()}).\n\n'
                f'```{{eval-rst}}\n.. automodule:: oneshui.{name}\n   :members:\n```\n')
        (SRC / f'reference/{name}.md').write_text(text)
    intro = '# Reference\n\nA page a module; each is exported from the notebook that tells it.\n\n'
    (SRC / 'reference/index.md').write_text(intro + toctree('', sorted(modules)))


def toctree(caption, pages):
    head = f':hidden:\n:caption: {caption}\n' if caption else ':maxdepth: 2\n'
    return f'```{{toctree}}\n{head}\n' + '\n'.join(pages) + '\n```\n'


def front_page():
    "The README, and the site's table of contents."
    pages = lambda pattern: sorted(f'nbs/{p.relative_to(ROOT / "nbs").with_suffix("")}' for p in (ROOT / 'nbs').glob(pattern))
    look_up = ['docs/glossary', 'reference/index', 'docs/contributing', 'docs/references']
    look_up = [p for p in look_up if (SRC / p).with_suffix('.md').exists()]
    trees = [('Chapters', pages('[0-9]*.ipynb')), ('Tools', pages('api/*.ipynb')), ('Look up', look_up)]
    (SRC / 'index.md').write_text((ROOT / 'README.md').read_text() + '\n' + '\n'.join(toctree(*t) for t in trees))


def lay_out():
    shutil.rmtree(SRC, ignore_errors=True)
    python = shutil.ignore_patterns('*.py', '__pycache__')
    shutil.copytree(ROOT / 'docs', SRC / 'docs', ignore=python)
    shutil.copytree(ROOT / 'figures/published', SRC / 'figures/published')
    shutil.copytree(ROOT / 'oneshui/presets', SRC / 'oneshui/presets')
    shutil.copy(ROOT / 'CITATION.cff', SRC)
    for p in (ROOT / 'nbs').rglob('*.ipynb'):
        if p.stem != 'index' and '.ipynb_checkpoints' not in p.parts:
            notebook(p, SRC / p.relative_to(ROOT))
    reference(told_in())
    front_page()


if __name__ == '__main__':
    lay_out()
    sphinx = [sys.executable, '-m', 'sphinx', '-b', 'html', '-W', '--keep-going', '-q', '-j', 'auto']
    here = os.pathsep.join([str(ROOT), str(ROOT / 'docs'), os.environ.get('PYTHONPATH', '')])
    sys.exit(subprocess.run([*sphinx, '-c', ROOT / 'docs', SRC, SITE / 'html'], env=os.environ | dict(PYTHONPATH=here)).returncode)
