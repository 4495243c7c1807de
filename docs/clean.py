"""Takes the live views of widgets, and their state, out of the committed notebooks:
their pictures stay. Called by `make notebooks`, after nbdev_clean."""
import json
from pathlib import Path

VIEW = 'application/vnd.jupyter.widget-view+json'

for path in (Path(__file__).resolve().parents[1] / 'nbs').rglob('*.ipynb'):
    nb = json.loads(path.read_text())
    outputs = [o for c in nb['cells'] for o in c.get('outputs', [])]
    views = [o['data'].pop(VIEW) for o in outputs if VIEW in o.get('data', {})]
    state = nb['metadata'].pop('widgets', None)
    if views or state:
        path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n')
