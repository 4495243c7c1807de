"""The rooms of the package and who uses whom, drawn from the imports.

python docs/rooms.py    writes figures/published/rooms.svg and rooms.png
"""
import ast
import json
import re
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / 'figures/published/rooms.svg'
# A room uses only rooms above it. A new module takes its place here.
ROOMS = ('core ranks metrics data readers portraits vit methods metaunlearn metastep '
         'attacks oracles presets cluster runs intervals results tables experiments '
         'tuning audits probes questions regimes kept claims scale explore '
         'handlers photos kit rehearsal preparing ledger reports desk '
         'evidence aftermath inspection findings cli').split()


def sources():
    "room -> source of its module, for every module that is there."
    files = sorted((ROOT / 'oneshui').glob('[!_]*.py'))
    return {f.stem: f.read_text() for f in files}


def imported(source):
    "The rooms that a module imports from, wherever in it the import stands."
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            name = node.module or ''
            if node.level == 1: name = f'oneshui.{name}'.rstrip('.')
            if name == 'oneshui': rooms |= {a.name for a in node.names}
            if name.startswith('oneshui.'): rooms.add(name.split('.')[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split('.')[1] for a in node.names
                      if a.name.startswith('oneshui.')}
    return rooms


def house(modules):
    "room -> what it is for and which rooms it uses, in the order of `ROOMS`."
    known = [r for r in ROOMS if r in modules] + sorted(set(modules) - {*ROOMS})
    docs = {r: ast.get_docstring(ast.parse(modules[r])) or '' for r in known}
    purpose = {r: re.sub('[`*]', '', doc) for r, doc in docs.items()}   # no Markdown
    used = {r: imported(modules[r]) for r in known}
    return {r: dict(purpose=purpose[r].split('\n')[0],
                    uses=[u for u in known if u in used[r]]) for r in known}


def reach(rooms, room):
    "Every room that a room depends on, directly or through others."
    return set().union(*({u} | reach(rooms, u) for u in rooms[room]['uses']))


def arrows(rooms):
    "(room, used, whether no other room that it uses leads there) for every import."
    for r, said in rooms.items():
        for u in said['uses']:
            others = (reach(rooms, o) for o in said['uses'] if o != u)
            yield r, u, not any(u in o for o in others)


def story(room):
    "The notebook that tells a room: its path inside nbs/."
    for f in (ROOT / 'nbs').rglob('*.ipynb'):
        if f'"#| default_exp {room}"' in f.read_text():
            return str(f.relative_to(ROOT / 'nbs').with_suffix(''))
    return ''


def draw(rooms):
    "One line for each room; arrows go up to the rooms that it uses."
    from matplotlib import pyplot as plt
    y = {r: -i for i, r in enumerate(rooms)}
    fig, ax = plt.subplots(figsize=(11, .62 * len(rooms)))
    for r, u, nearest in sorted(arrows(rooms), key=lambda a: a[2]):
        draw_arrow(ax, y[r], y[u], f'C{-y[u] % 10}' if nearest else '.86', nearest)
    for r, said in rooms.items(): draw_room(ax, r, y[r], said)
    ax.set(xlim=(-3.1, 12), ylim=(.4 - len(rooms), .6))
    ax.axis('off')
    return fig


def draw_arrow(ax, start, end, colour, nearest):
    "From a room to one that it uses; coloured where no shorter way leads there."
    from matplotlib.patches import FancyArrowPatch
    bend = .5 if start - end > -5 else .35   # long ways keep closer to the wall
    ax.add_patch(FancyArrowPatch(
        (0, start), (0, end), color=colour, lw=1.5 if nearest else .7,
        zorder=2 if nearest else 1, arrowstyle='-|>', mutation_scale=9,
        connectionstyle=f'arc3,rad={-bend}', shrinkA=4, shrinkB=4))


def draw_room(ax, room, y, said):
    "Name, notebook, purpose, and every room that it uses."
    ax.plot(0, y, 'o', color=f'C{-y % 10}', ms=7, zorder=3)
    ax.text(.25, y + .03, room, va='bottom', weight='bold', size=11)
    ax.text(.25, y - .07, story(room), va='top', size=8, color='.4')
    ax.text(2.6, y + .03, said['purpose'], va='bottom', size=9)
    uses = ', '.join(said['uses']) or 'nothing of the package'
    ax.text(2.6, y - .07, f'uses {uses}', va='top', size=8, color='.4')


def drawn(picture=PICTURE):
    "What the committed picture was drawn from."
    for node in ElementTree.parse(picture).iter():
        if node.tag.endswith('}description'): return json.loads(node.text)


def main():
    import matplotlib
    matplotlib.use('Agg')
    matplotlib.rcParams.update({'svg.hashsalt': 'rooms', 'svg.fonttype': 'none'})
    rooms = house(sources())
    said = {'Date': None, 'Description': json.dumps(rooms)}
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    fig = draw(rooms)
    fig.savefig(PICTURE, bbox_inches='tight', metadata=said)
    fig.savefig(PICTURE.with_suffix('.png'), bbox_inches='tight', dpi=110)


if __name__ == '__main__': main()
