"""The house rules: what keeps cells, functions, rooms and words as a reader wants them.

A rule looks at sources and names each place that breaks it. Nothing is imported.
"""
import ast
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CELL, WIDTH, FUNCTION, PARAMETERS = 25, 88, 40, 8

# What may break a rule, and why. The list can only shrink: an exception that no rule
# needs any more fails a test, and so does a longer list.
EXCEPTIONS = {}
MOST_EXCEPTIONS = 0


def load_rooms():
    "docs/rooms.py, which knows the order of the rooms."
    spec = importlib.util.spec_from_file_location('rooms', ROOT / 'docs/rooms.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = load_rooms()


@dataclass
class House:
    "What the rules look at: sources by name."
    cells: dict = field(default_factory=dict)    # notebook -> code cells; None: prose
    modules: dict = field(default_factory=dict)  # room -> source
    texts: dict = field(default_factory=dict)    # file or cell -> what a reader sees


RULES = {}   # name -> (rule, what to do)


def rule(remedy):
    "A function of a House that yields (place, what is wrong there)."
    def declare(fn):
        RULES[fn.__name__] = fn, remedy
        return fn
    return declare


# The sources

def output_text(cell):
    "What a code cell printed, and its tables; pictures are left out."
    for o in cell.get('outputs', ()):
        yield from o.get('text', ())
        for kind, text in o.get('data', {}).items():
            if kind in ('text/plain', 'text/markdown', 'text/html'): yield ''.join(text)


def read_notebooks():
    "notebook -> its cells as nbformat has them."
    files = sorted((ROOT / 'nbs').rglob('*.ipynb'))
    return {str(f.relative_to(ROOT)): json.loads(f.read_text())['cells'] for f in files
            if '.ipynb_checkpoints' not in f.parts}


def read_texts(notebooks):
    "Every word that a reader may see, by where it stands."
    texts = {f'{nb}, cell {k}': '\n'.join([''.join(c['source']), *output_text(c)])
             for nb, cells in notebooks.items() for k, c in enumerate(cells)}
    files = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'),
             *(ROOT / 'docs').glob('*.py'), *(ROOT / 'benchmarks').glob('*.py'),
             *(ROOT / 'figures/published').rglob('*.md')]
    return texts | {str(f.relative_to(ROOT)): f.read_text() for f in files}


@pytest.fixture(scope='module')
def house():
    notebooks = read_notebooks()
    cells = {nb: [''.join(c['source']) if c['cell_type'] == 'code' else None
                  for c in cs] for nb, cs in notebooks.items()}
    return House(cells, rooms.sources(), read_texts(notebooks))


def code_cells(house):
    "(notebook, number of the cell, its lines) of every code cell."
    for nb, cells in house.cells.items():
        for k, source in enumerate(cells):
            if source is not None: yield nb, k, source.splitlines()


def functions(source):
    "(qualified name, function) of every function of a module, nested ones too."
    def inside(node, above):
        for n in ast.iter_child_nodes(node):
            is_def = isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
            named = is_def or isinstance(n, ast.ClassDef)
            name = f'{above}.{n.name}'.strip('.') if named else above
            if is_def: yield name, n
            yield from inside(n, name)
    return inside(ast.parse(source), '')


def decorators(fn):
    "The names a function is decorated with: `@method(…)`, `@metrics.metric` and so on."
    calls = [d.func if isinstance(d, ast.Call) else d for d in fn.decorator_list]
    return {ast.unparse(c).split('.')[-1] for c in calls}


def exported(source):
    "The definitions that `__all__` lists."
    tree = ast.parse(source)
    names = {e.value for n in tree.body if isinstance(n, ast.Assign)
             and ast.unparse(n.targets[0]) == '__all__' for e in n.value.elts}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n for n in tree.body if isinstance(n, kinds) and n.name in names]


def public_functions(source):
    "(name, function) of exported functions and of the methods of exported classes."
    for n in exported(source):
        if not isinstance(n, ast.ClassDef): yield n.name, n; continue
        for m in n.body:
            if isinstance(m, ast.FunctionDef) and (
                    m.name == '__init__' or not m.name.startswith('_')):
                yield f'{n.name}.{m.name}', m


# The rules

@rule('Give the thing in the middle a name: a function, or a cell of its own.')
def short_cells(house):
    for nb, k, lines in code_cells(house):
        lines = [line for line in lines if line.strip()]
        if len(lines) > CELL: yield f'{nb}, cell {k}', f'{len(lines)} lines: {lines[0]}'


@rule('Give the thing in the middle of the line a name.')
def narrow_lines(house):
    for nb, k, lines in code_cells(house):
        for i, line in enumerate(lines, 1):
            said = f'{len(line)} columns: {line.strip()}'
            directive = line.startswith('#|')   # an alternative text stands on one line
            if len(line) > WIDTH and not directive:
                yield f'{nb}, cell {k}, line {i}', said


@rule('Give the thing in the middle a name, as a function of its own.')
def short_functions(house):
    for room, source in house.modules.items():
        lines = source.splitlines()
        for name, fn in functions(source):
            own = [x for x in lines[fn.lineno - 1:fn.end_lineno] if x.strip()]
            if len(own) > FUNCTION:
                yield f'oneshui/{room}.py: {name}', f'{len(own)} lines from {fn.lineno}'


@rule('Hand over one thing that has a name in place of its parts.')
def few_parameters(house):
    for room, source in house.modules.items():
        first = first_moments(source)
        for name, fn in functions(source):
            a = fn.args
            every = [*a.posonlyargs, *a.args, *filter(None, [a.vararg, a.kwarg])]
            settings = 'method' in decorators(fn) or name in first
            if not settings: every += a.kwonlyargs
            every = [p for p in every if p.arg not in ('self', 'cls')]
            if len(every) > PARAMETERS:
                yield f'oneshui/{room}.py: {name}', f'{len(every)} parameters'


@rule('Make the name public where it is defined, or move what needs it there.')
def private_names_stay(house):
    sources = {f'oneshui/{room}.py': s for room, s in house.modules.items()}
    for nb, k, lines in code_cells(house):
        code = '\n'.join(line for line in lines if line.lstrip()[:1] not in '%!')
        sources[f'{nb}, cell {k}'] = code
    for place, source in sources.items():
        for line, name in taken_from_rooms(ast.parse(source)):
            if name.startswith('_') and not name.startswith('__'):
                yield f'{place}, line {line}', f'{name} is private to its module'


def taken_from_rooms(tree):
    "(line, name) of `from .data import name`, and of `data.name` where data is a room."
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    called = set()   # the names by which the source calls modules of the package
    for n in froms:
        package = n.module == 'oneshui' or n.level and not n.module
        if package: called |= {a.asname or a.name for a in n.names}
        if package or n.level or (n.module or '').startswith('oneshui.'):
            yield from ((n.lineno, a.name) for a in n.names)
    for n in ast.walk(tree):
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
            if n.value.id in called: yield n.lineno, n.attr


@rule('Move what is needed into a room above both; the order stands in docs/rooms.py.')
def imports_point_upwards(house):
    for room, said in rooms.house(house.modules).items():
        if room not in rooms.ROOMS:
            yield f'oneshui/{room}.py', 'has no place in the order of rooms'; continue
        above = rooms.ROOMS[:rooms.ROOMS.index(room)]
        for used in said['uses']:
            if used not in above: yield f'oneshui/{room}.py', f'uses {used}, below it'


@rule('Say in one sentence what it is or does, as its docstring.')
def exports_are_documented(house):
    for room, source in house.modules.items():
        if not ast.get_docstring(ast.parse(source)):
            yield f'oneshui/{room}.py', 'no docstring (the quote under the title)'
        public = [(n.name, n) for n in exported(source)]
        public += [(name, f) for name, f in public_functions(source)
                   if '.' in name and f.name != '__init__' and len(f.body) > 3]
        for name, n in public:
            said = ast.get_docstring(n)
            if not said: yield f'oneshui/{room}.py: {name}', 'no docstring'


# What these decorators declare is called with arguments that are explained once, where
# the decorator is. Settings differ from one to the next and need their types.
DECLARED = {'method', 'metric', 'dataset'}
ONCE_FOR_ALL = {'retain', 'forget'}


def first_moments(source):
    "The functions that a decorator names: `@method(…, prepare=ssd_prepare)`."
    return {k.value.id for _, fn in functions(source) for d in fn.decorator_list
            if isinstance(d, ast.Call) for k in d.keywords
            if k.arg == 'prepare' and isinstance(k.value, ast.Name)}


@rule('Annotate it, or where no type says it, comment on its line.')
def parameters_have_types(house):
    for room, source in house.modules.items():
        lines, first = source.splitlines(), first_moments(source)
        for name, fn in public_functions(source):
            a = fn.args
            every, known = [*a.posonlyargs, *a.args, *a.kwonlyargs], {'self', 'cls'}
            if decorators(fn) & DECLARED or name in first:
                every, known = a.kwonlyargs, ONCE_FOR_ALL
            bare = [p.arg for p in every if not p.annotation and p.arg not in known
                    and not re.search(rf'\b{p.arg}\b[^#]*#', lines[p.lineno - 1])]
            if bare:
                yield (f'oneshui/{room}.py: {name}',
                       f'{", ".join(bare)}: no type (line {fn.lineno})')


@rule('Ask core: default_device, device_of, same_noise, precision.')
def one_module_knows_cuda(house):
    for room, source in house.modules.items():
        for i, line in enumerate(source.splitlines(), 1):
            if room != 'core' and 'cuda' in line.lower():
                yield f'oneshui/{room}.py, line {i}', line.strip()


OUTSIDE = [r'\b[Ss]pec(ification)?[ ,]*§', r'§ ?[\d.]* of the (task|spec)',
           r'\b[Mm]ission\b', r'\b[Tt]he brief\b', r'\b[Ii]ssue #?\d',
           r'\b(design|stumbles|style|field|spec)\.md\b', r'\bshared/', r'/work/']


@rule("Cite the paper's section ('paper §4'), or the chapter that says it.")
def only_documents_that_a_reader_has(house):
    yield from found(house, OUTSIDE)


UNCLEAR = [r'\b[Ii]n the place of\b', r'\b[Cc]lear of (0|zero)\b',
           r'(^|[^\w`\s-] ?|\b(with|into|is) )[Aa]n? (?!as|for|in|is)\w+ an? [a-z]+']


@rule("Say 'instead of', 'the 95 % interval excludes 0', 'one row for each method'.")
def words_that_read_once(house):
    yield from found(house, UNCLEAR)


def found(house, patterns):
    "Where a text, joined over its line breaks, has one of the patterns."
    for place, text in house.texts.items():
        flat = re.sub(r'\s+(?:> ?)?', ' ', text)
        for p in patterns:
            for hit in re.finditer(p, flat):
                yield place, f'"{flat[max(0, hit.start() - 30):hit.end() + 30]}"'


def excepted(name, place):
    return any(place.startswith(p) for p in EXCEPTIONS.get(name, ()))


@pytest.mark.parametrize('name', RULES)
def test_rule(name, house):
    check, remedy = RULES[name]
    broken = [f'{place}: {what}' for place, what in check(house)
              if not excepted(name, place)]
    assert not broken, f'{remedy}\n' + '\n'.join(broken)


def test_exceptions_can_only_shrink(house):
    for name, places in EXCEPTIONS.items():
        still = [place for place, _ in RULES[name][0](house)]
        for p in places:
            needed = any(s.startswith(p) for s in still)
            assert needed, f'{name}: {p} keeps the rule now; take it off EXCEPTIONS'
    count = sum(map(len, EXCEPTIONS.values()))
    assert count <= MOST_EXCEPTIONS, 'a new exception: keep the rule instead'
    assert count == MOST_EXCEPTIONS, f'fewer exceptions: MOST_EXCEPTIONS = {count}'


def module(code, **more):
    "A House with one or two modules."
    return House(modules={'vit': code} | more)


def cell(code): return House(cells={'nbs/x.ipynb': [None, code]})


def text(words): return House(texts={'nbs/x.ipynb, cell 3': words})


LONG = 'def f():\n' + '    x = 1\n' * FUNCTION
EIGHT = ', '.join(f'p{i}' for i in range(PARAMETERS))
EXPORTS_F, EXPORTS_A = '"d"\n__all__ = ["f"]\n', '"d"\n__all__ = ["A"]\n'
METHOD_OF_FOUR = 'class A:\n  "d"\n  def f(self):\n    1\n    2\n    3\n    4'
PREPARED = 'def f(model, train): 0\n@method("F", prepare=f)\ndef g(m): 0'

BAD = [   # rule, what breaks it, what the message says
    ('short_cells', cell('x = 1\n' * (CELL + 1)), 'nbs/x.ipynb, cell 1: 26 lines'),
    ('narrow_lines', cell('x\n' + 'y' * (WIDTH + 1)), 'cell 1, line 2: 89 columns'),
    ('short_functions', module(LONG), 'vit.py: f: 41 lines'),
    ('short_functions', module('class A:\n' + re.sub('(?m)^', ' ', LONG)), 'A.f: 41'),
    ('few_parameters', module(f'def f({EIGHT}, one): 0'), 'vit.py: f: 9 parameters'),
    ('few_parameters', module(f'def f({EIGHT}, *, one): 0'), 'f: 9 parameters'),
    ('few_parameters', module(f'class A:\n  def f(self, {EIGHT}, *one): 0'), 'A.f: 9'),
    ('private_names_stay', module('from .data import _find'), '_find is private'),
    ('private_names_stay', module('from . import data\ndata._find()'), 'line 2: _find'),
    ('private_names_stay', cell('%time\nfrom oneshui.data import _find'), 'cell 1, '),
    ('imports_point_upwards', module('from .runs import a', runs=''), 'uses runs'),
    ('imports_point_upwards', module('def f(): import oneshui.runs', runs=''), 'runs'),
    ('imports_point_upwards', module('from oneshui import runs', runs=''), 'uses runs'),
    ('imports_point_upwards', module('', attic=''), 'attic.py: has no place'),
    ('exports_are_documented', module('x = 1'), 'vit.py: no docstring'),
    ('exports_are_documented', module(EXPORTS_F + 'def f(): 0'), 'vit.py: f'),
    ('exports_are_documented', module(EXPORTS_A + 'class A: 0'), 'vit.py: A'),
    ('exports_are_documented', module(EXPORTS_A + METHOD_OF_FOUR), 'vit.py: A.f'),
    ('parameters_have_types', module(EXPORTS_F + 'def f(x): 0'), 'f: x: no type'),
    ('parameters_have_types', module(EXPORTS_F + 'def f(x=1, *, y: int): 0'), 'f: x:'),
    ('parameters_have_types', module(EXPORTS_A + 'class A:\n def f(self, x): 0'), 'x'),
    ('parameters_have_types', module(EXPORTS_F + '@method("F")\ndef f(m, *, lr): 0'),
     'f: lr: no type'),
    ('one_module_knows_cuda', module('x.to("cuda")'), 'vit.py, line 1'),
    ('one_module_knows_cuda', module('# on CUDA', core='cuda'), 'vit.py, line 1'),
    ('only_documents_that_a_reader_has', text('as the spec,\n§7.2, says'), 'cell 3'),
    ('only_documents_that_a_reader_has', text("the mission's assumptions"), 'mission'),
    ('only_documents_that_a_reader_has', text('§2 of the task'), '§2'),
    ('words_that_read_once', text('in the\n> place of'), 'in the place of'),
    ('words_that_read_once', text('which is clear of 0.'), 'clear of 0'),
    ('words_that_read_once', text('a dot a seed'), 'a dot a seed'),
    ('words_that_read_once', text('def f():\n  "A line a run."'), 'A line a run'),
    ('words_that_read_once', text('scores, a row an image'), 'a row an image'),
]


@pytest.mark.parametrize('name, bad, says', BAD, ids=range(len(BAD)))
def test_a_rule_can_fail(name, bad, says):
    broken = [f'{place}: {what}' for place, what in RULES[name][0](bad)]
    assert len(broken) == 1 and says in broken[0], broken


GOOD = [
    ('short_cells', cell('x = 1\n\n' * CELL)),
    ('narrow_lines', cell('#| fig-alt: ' + 'y' * WIDTH + '\n' + 'y' * WIDTH)),
    ('short_functions', module(LONG.replace('    x = 1\n', '\n\n', 1))),
    ('few_parameters', module(f'class A:\n  def f(self, {EIGHT}): 0')),
    ('few_parameters', module(f'@method("F", prepare=None)\ndef f(m, *, {EIGHT}): 0')),
    ('few_parameters', module(f'def p(m, *, {EIGHT}): 0\n'
                              '@method("F", prepare=p)\ndef f(m): 0')),
    ('private_names_stay', module('from .data import __all__\n_x = 1\nself._x')),
    ('imports_point_upwards', module('from .data import a', data='')),
    ('parameters_have_types', module(EXPORTS_F + 'def f(\n  x, # anything\n): 0')),
    ('parameters_have_types', module(EXPORTS_F + 'def f(x: int, y: str = ""): 0')),
    ('parameters_have_types', module(EXPORTS_F + PREPARED)),
    ('one_module_knows_cuda', House(modules={'core': 'cuda'})),
    ('only_documents_that_a_reader_has', text('paper §4; the specification of a run')),
    ('words_that_read_once', text('It makes a reader a data set. 1 - a in an x')),
    ('words_that_read_once', text('once in a while a step, the smallest A on a few')),
]


@pytest.mark.parametrize('name, good', GOOD, ids=range(len(GOOD)))
def test_a_rule_can_pass(name, good):
    assert not list(RULES[name][0](good))


def test_every_rule_is_tried():
    assert {name for name, *_ in BAD} == set(RULES)


def test_ruff():
    ruff = Path(sys.executable).parent / 'ruff'
    r = subprocess.run([ruff, 'check', '--output-format', 'concise', '--no-cache', '.'],
                       cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr


def test_picture_of_the_rooms_is_of_today():
    today = rooms.house(rooms.sources())
    assert rooms.drawn() == today, 'run python docs/rooms.py, which draws the imports'


def test_every_arrow_is_kept_or_implied():
    "In a house of three floors, the short cut from top to bottom is no nearest way."
    three = {'core': '', 'data': 'from .core import a',
             'vit': 'from .core import a\nfrom .data import b'}
    nearest = {(a, b): n for a, b, n in rooms.arrows(rooms.house(three))}
    assert nearest == {('data', 'core'): True, ('vit', 'data'): True,
                       ('vit', 'core'): False}
