"""Notebooks -> Sphinx sources in build/docs/source -> a site in build/docs/html. Called by `make docs`; no notebook is executed."""
import ast, html, importlib, inspect, json, re, shutil, subprocess, sys
from pathlib import Path

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
NBS, HERE, SITE = ROOT / 'nbs', ROOT / 'docs', ROOT / 'build/docs'
SRC = SITE / 'source'
MODULES = sorted(p.stem for p in (ROOT / 'oneshui').glob('*.py') if not p.stem.startswith('_'))
PUBLIC = {m: importlib.import_module(f'oneshui.{m}') for m in MODULES}
HOMES, CODE = {}, {}   # public name -> modules that define it; page -> what the names in its code stand for
for m, mod in PUBLIC.items():
    for n in mod.__all__: HOMES.setdefault(n, []).append(m)


def anchor(module, name):
    return f'oneshui.{module}.{name}{"-class" * name[0].isupper()}'.lower()   # Sphinx folds case: Method is not method


def link_names(text, up):
    "`name`, `module.name` and `oneshui.module.name` in prose become links to their definitions."
    def one(hit):
        m, _, n = hit[1].split('(')[0].removeprefix('oneshui.').rpartition('.')
        if not m and n in MODULES and hit[1].startswith('oneshui.'):
            return f'[`{hit[1]}`]({up}reference/{n}.md)'
        home = m if m in MODULES and n in PUBLIC[m].__all__ else HOMES[n][0] if not m and len(HOMES.get(n, [])) == 1 else None
        return f'[`{hit[1]}`]({up}reference/{home}.md#{anchor(home, n)})' if home else hit[0]
    return re.sub(r'(?<![\[`])`([A-Za-z_][\w.]*(?:\(\))?)`(?![`\]])', one, text)


def link_terms(text, seen):
    "The first use of a glossary term on a page leads to its definition."
    for term, spelling in TERMS:
        if term in seen: continue
        new, k = re.subn(
            rf'(?<![\w`\[*$/-])({spelling})(?![\w`\]*$-])',
            lambda h: f'{{term}}`{h[1]} <{term}>`',
            text,
            count=1,
            flags=re.I,
        )
        if k: seen.add(term); text = new
    return text


def prose(text, up, seen):
    "Links in a Markdown cell, leaving headings, tables' rules, maths, code and existing links alone."
    out, fenced = [], False
    for line in text.split('\n'):
        if line.lstrip().startswith('```'): fenced = not fenced
        if not fenced and not line.startswith('#'):
            line = re.sub(r'\]\((?:\.\./)*(nbs|figures)/', lambda h: f']({up}{"figures/" if h[1] == "figures" else ""}', line)
            parts = re.split(r'(\$[^$]*\$|`[^`]*`|\[[^\]]*\]\([^)]*\)|!\[[^\]]*\]\([^)]*\))', link_names(line, up))
            line = ''.join(p if i % 2 or line.startswith('|') else link_terms(p, seen) for i, p in enumerate(parts))
        out.append(line)
    return '\n'.join(out)


def alternative(c, src):
    "A picture's alternative text: the cell's `#| fig-alt:` line, or what the output says of itself."
    if m := re.search(r'(?m)^#\|\s*fig-alt: *(.+)$', src): return m[1]
    said = [''.join(o['data'].get('text/plain', '')) for o in c['outputs'] if 'image/png' in o.get('data', {})]
    return next((t for t in said if t and not t.startswith('<')), None)


def imported(sources, raw):
    "What the names in a page's code stand for: name -> (module, name of the definition). No name that the page also gives to something else."
    names, taken = {}, set(); own = re.search(r'default_exp (\w+)', raw)
    for node in (n for src in sources for n in ast.walk(ast.parse(re.sub(r'(?m)^\s*[%!].*$', '', src)))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('oneshui.'):
            m = node.module[8:]
            names |= {a.asname or a.name: (m, a.name) for a in node.names} | {n: (m, n) for a in node.names if a.name == '*' for n in PUBLIC[m].__all__}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and own: names[node.name] = own[1], node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): taken.add(node.id)
        elif isinstance(node, ast.arg): taken.add(node.arg)
    return {k: v for k, v in names.items() if k not in taken and v[0] in MODULES and v[1] in PUBLIC[v[0]].__all__}


def link_code():
    "In the pages' code, the package's modules and names become links to their definitions."
    for page, names in CODE.items():
        f = SITE / 'html' / page; up = '../' * page.count('/'); text = f.read_text()
        def one(hit):
            name = html.unescape(hit[2])
            m, n = (name[8:], None) if hit[1] == 'nn' and name.startswith('oneshui.') else names.get(name, (None, None))
            return f'<a href="{up}reference/{m}.html{"#" + slug(m, n) if n else ""}">{hit[0]}</a>' if m in MODULES else hit[0]
        slug = lambda m, n: re.sub(r'[^a-z0-9]+', '-', anchor(m, n)).strip('-')
        f.write_text(
            re.sub(
                r'<div class="cell_input.*?</pre>',
                lambda block: re.sub(r'(?<!">)<span class="(n|nn|nf|nc)">([^<]+)</span>', one, block[0]),
                text,
                flags=re.S,
            )
        )


def chapter(path):
    "A notebook without directives and hidden cells, with links; remarks become set-off notes."
    rel = path.relative_to(NBS)
    up = '../' * (len(rel.parts) - 1)
    nb = json.loads(path.read_text())
    cells, seen = [], set()
    for c in nb['cells']:
        src = ''.join(c['source'])
        if re.match(r'#\|\s*(hide|default_exp)\b', src): continue
        if c['cell_type'] == 'markdown':
            # a displayed formula is a paragraph
            src = re.sub(r'(?ms)^(\$\$.*?\$\$)([^\n]*)$', lambda h: f'\n{h[1]}\n\n{h[2]}', src)
            src = re.sub(r'\A(# [^\n]+\n+)> ([^\n]+)', r'\1*\2*', src)
            src = re.sub(r'(?m)(?:^> ?.*\n?)+', lambda h: ':::{note}\n' + re.sub(r'(?m)^> ?', '', h[0]).rstrip() + '\n:::\n', src)
            src = prose(src, up, seen)
        else:
            for data in (o['data'] for o in c['outputs'] if 'text/markdown' in o.get('data', {})):
                data['text/markdown'] = ''.join(data['text/markdown']).replace(' ± ', '\u00a0±\u00a0')   # a number and its error stay together
            if alt := alternative(c, src):
                c = c | dict(metadata=c['metadata'] | dict(mystnb=dict(image=dict(alt=alt))))
            src = re.sub(r'(?m)^#\|.*\n?', '', src)
        cells.append(c | dict(source=src))
    CODE[str(rel.with_suffix('.html'))] = imported(
        [c['source'] for c in cells if c['cell_type'] == 'code'], json.dumps(nb['cells'])
    )
    (SRC / rel).parent.mkdir(parents=True, exist_ok=True)
    (SRC / rel).write_text(json.dumps(nb | dict(cells=cells)))


def cell(text): return ' '.join(str(text).split()).replace('|', '\\|')


def signature(fn):
    try: s = str(inspect.signature(fn))
    except (TypeError, ValueError): return '()'   # an exception, say
    s = re.sub(r'typing\.Annotated\[([\w.]+), .*?\](?= =|,|\))', r'\1', s)
    s = re.sub(r'<function (\w+) at \w+>', r'\1', s)
    return (
        re.sub(r'torch\.(?:nn\.modules\.module\.)?|pathlib\._?\w*\.?|oneshui\.\w+\.', '', s)
        .replace('(self, ', '(')
        .replace('(self)', '()')
        .replace("'", '')
    )


def entry(module, name):
    "A definition: signature, docstring, a table of its parameters, where it is told."
    obj = getattr(PUBLIC[module], name); out = [f'({anchor(module, name)})=', f'## {name}', '']
    if not callable(obj):
        return '\n'.join(out + ['```python', f'{name} = {cell(repr(obj))[:300]}', '```', ''])
    fn = obj.__init__ if inspect.isclass(obj) and '__init__' in vars(obj) else obj
    out += [
        '```python',
        f'{"class " if inspect.isclass(obj) else ""}{name}{signature(fn)}',
        '```',
        '',
        (inspect.getdoc(obj) or '').strip(),
        '',
    ]
    try: params = {k: v for k, v in docments(fn, full=True).items() if k != 'self'}
    except Exception: params = {}
    rows = [(k, v) for k, v in params.items() if v.get('docment')]
    if rows:
        out += (
            ['| | meaning | default |', '|---|---|---|']
            + [
                f'| {"*returns*" if k == "return" else f"`{k}`"} | {cell(v["docment"])} | {"" if k == "return" or v["default"] is inspect.Parameter.empty else f"`{cell(v.default)}`"} |'
                for k, v in rows
            ]
            + ['']
        )
    for k, v in vars(obj).items() if inspect.isclass(obj) else ():
        f = v.fget if isinstance(v, property) else v
        if not k.startswith('_') and inspect.isfunction(f) and inspect.getdoc(f):
            out += [f'`.{k}{"" if isinstance(v, property) else signature(f)}`', f': {inspect.getdoc(f)}', '']
    return '\n'.join(out)


def reference():
    (SRC / 'reference').mkdir(parents=True); told = {}
    for p in NBS.rglob('*.ipynb'):
        if m := re.search(r'#\| default_exp (\w+)', p.read_text()): told[m[1]] = p.relative_to(NBS)
    for m in MODULES:
        head = f'# oneshui.{m}\n\n{inspect.getdoc(PUBLIC[m]) or ""}\n\nTold in [{told[m].stem}](../{told[m]}).\n\n'
        (SRC / f'reference/{m}.md').write_text(head + '\n'.join(entry(m, n) for n in PUBLIC[m].__all__))
    (SRC / 'reference/index.md').write_text(
        '# Reference\n\nA page a module; each is exported from the notebook that tells it.\n\n```{toctree}\n:maxdepth: 2\n\n'
        + '\n'.join(MODULES)
        + '\n```\n'
    )


def main():
    global TERMS
    shutil.rmtree(SRC, ignore_errors=True); SRC.mkdir(parents=True)
    for f in HERE.iterdir():
        if f.name not in ('build.py', '__pycache__'):
            (shutil.copytree if f.is_dir() else shutil.copy)(f, SRC / f.name)
    shutil.copy(ROOT / 'settings.ini', SRC)
    shutil.copytree(
        ROOT / 'figures/mini',
        SRC / 'figures/mini',
        ignore=lambda d, names: [n for n in names if not n.endswith('.png')],
    )
    TERMS = [(t, s) for t, s in re.findall(r'(?m)^([^\s:%{`#][^%\n]*?) *% *(.+)$', (HERE / 'glossary.md').read_text())]
    g = SRC / 'glossary.md'
    g.write_text(re.sub(r'(?m)^([^\s:%{`#][^%\n]*?) *% *.+$', r'\1', g.read_text()))
    for p in sorted(NBS.rglob('*.ipynb')):
        if '.ipynb_checkpoints' not in p.parts: chapter(p)
    reference()
    chapters = sorted(p.stem for p in NBS.glob('[0-9]*.ipynb'))
    api = [p.stem for p in sorted((NBS / 'api').glob('*.ipynb'))]
    index = json.loads((SRC / 'index.ipynb').read_text())
    toc = lambda caption, pages: f'```{{toctree}}\n:hidden:\n:caption: {caption}\n\n' + '\n'.join(pages) + '\n```'
    index['cells'].append(dict(cell_type='markdown', metadata={}, id='toc', source='\n\n'.join([toc('Chapters', chapters), toc('Tools', [f'api/{a}' for a in api]), toc('Look up', ['reference/index', 'glossary', 'references'])])))
    (SRC / 'index.ipynb').write_text(json.dumps(index))
    failed = subprocess.run(
        [sys.executable, '-m', 'sphinx', '-b', 'html', '-W', '--keep-going', '-q', '-j', 'auto', SRC, SITE / 'html']
    ).returncode
    link_code(); sys.exit(failed)


if __name__ == '__main__': main()
