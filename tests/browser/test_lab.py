"""JupyterLab in a real browser: open nbs/api/explore.ipynb, run all, move a slider, read the changed number. `make test-browser`."""
import json, re, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parents[2]; BIN = Path(sys.executable).parent


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A server on a copy of the notebook at preset smoke. Yields its address."
    d = tmp_path_factory.mktemp('lab'); nb = json.loads((ROOT / 'nbs/api/explore.ipynb').read_text())
    for c in nb['cells']:
        if 'parameters' in c['metadata'].get('tags', []):
            c['source'] = (
                ''.join(c['source'])
                .replace("preset = 'mini'", "preset = 'smoke'")
                .replace('store = None', f'store = {str(d / "runs")!r}')
            )
        if c['cell_type'] == 'code': c['outputs'] = []
    (d / 'explore.ipynb').write_text(json.dumps(nb))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    server = subprocess.Popen([BIN / 'jupyter', 'lab', '--no-browser', '--allow-root', f'--port={port}', '--IdentityProvider.token=', f'--ServerApp.root_dir={d}'],
                              cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f'http://127.0.0.1:{port}'
    for _ in range(120):
        try: urllib.request.urlopen(f'{url}/api/status'); break
        except OSError: time.sleep(.5)
    yield url; server.terminate(); server.wait(20)


def test_moving_the_slider_moves_the_number(lab, browser):
    page = browser.new_page(viewport=dict(width=1500, height=1000))
    page.goto(f'{lab}/lab/tree/explore.ipynb')
    page.set_default_timeout(60_000)
    page.get_by_role('tab', name='explore.ipynb').wait_for()
    page.get_by_role('button', name='python3 | Idle').wait_for()   # the kernel that the notebook names has started, unasked
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name=re.compile('^Run All Cells')).click()
    said = page.locator('.jp-OutputArea .widget-html-content', has_text='ToW').first
    said.wait_for(state='attached', timeout=240_000)
    said.scroll_into_view_if_needed()
    slider = page.locator('.widget-slider', has_text='length c').locator('.noUi-handle')
    before = said.text_content()
    tow = lambda text: float(re.search(r'ToW ([\d.]+)', text)[1])
    assert 'c = 1' in before and 0 <= tow(before) <= 100
    slider.focus(); [slider.press('ArrowRight') for _ in range(4)]
    expect(said).to_contain_text('c = 2', timeout=60_000)
    expect(said).not_to_contain_text('…', timeout=60_000)
    after = said.text_content()
    assert (
        after != before
        and re.search(r'on D_r, D_f, D_te: ([^;]+);', after)[1]
        != re.search(r'on D_r, D_f, D_te: ([^;]+);', before)[1]
    ), 'another step, other scores'
    assert (
        page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    ), 'noise in the outputs'
    out = ROOT / 'build/docs/photographs'
    out.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=out / 'lab.png')
    page.close()
