"""JupyterLab in a real browser: open nbs/api/explore.ipynb, run all, move a slider,
read the changed number. `make test-browser`."""
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def small_copy(notebook, folder):
    "The notebook at preset smoke with a store and results of its own, without outputs."
    nb = json.loads(notebook.read_text())
    for c in nb['cells']:
        if c['cell_type'] != 'code': continue
        c['outputs'], source = [], ''.join(c['source'])
        if 'parameters' in c['metadata'].get('tags', []):
            new = dict(preset='smoke', store=str(folder / 'runs'), out_dir=str(folder))
            for k, v in new.items():
                source = re.sub(rf'(?m)^{k} = \S+', f'{k} = {v!r}', source)
        c['source'] = source
    (folder / notebook.name).write_text(json.dumps(nb))


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def wait_for(address, seconds=60):
    for _ in range(2 * seconds):
        try: return urllib.request.urlopen(address)
        except OSError: time.sleep(.5)
    raise TimeoutError(address)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A server on a copy of the notebook. Yields its address."
    d, port = tmp_path_factory.mktemp('lab'), free_port()
    small_copy(ROOT / 'nbs/api/explore.ipynb', d)
    command = [BIN / 'jupyter', 'lab', '--no-browser', '--allow-root', f'--port={port}',
               '--IdentityProvider.token=', f'--ServerApp.root_dir={d}']
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = subprocess.Popen(command, cwd=ROOT, **quiet)
    url = f'http://127.0.0.1:{port}'
    wait_for(f'{url}/api/status')
    yield url
    server.terminate()
    server.wait(20)


def tow(text): return float(re.search(r'ToW ([\d.]+)', text)[1])
def three_scores(text): return re.search(r'on D_r, D_f, D_te: ([^;]+);', text)[1]


def run_all(page):
    page.get_by_role('tab', name='explore.ipynb').wait_for()
    # the kernel that the notebook names has started, unasked
    page.get_by_role('button', name='python3 | Idle').wait_for()
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name=re.compile('^Run All Cells')).click()


def test_moving_the_slider_moves_the_number(lab, browser):
    page = browser.new_page(viewport=dict(width=1500, height=1000))
    page.goto(f'{lab}/lab/tree/explore.ipynb')
    page.set_default_timeout(60_000)
    run_all(page)
    said = page.locator('.jp-OutputArea .widget-html-content', has_text='ToW').first
    said.wait_for(state='attached', timeout=240_000)
    said.scroll_into_view_if_needed()
    before = said.text_content()
    assert 'c = 1' in before and 0 <= tow(before) <= 100
    slider = page.locator('.widget-slider', has_text='length c').locator('.noUi-handle')
    slider.focus()
    for _ in range(4): slider.press('ArrowRight')
    expect(said).to_contain_text('c = 2', timeout=60_000)
    expect(said).not_to_contain_text('…', timeout=60_000)
    after = said.text_content()
    assert three_scores(after) != three_scores(before), 'another step, other scores'
    noise = '[data-mime-type="application/vnd.jupyter.stderr"]'
    assert page.locator(f'.jp-OutputArea-output{noise}').count() == 0
    out = ROOT / 'build/docs/photographs'
    out.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=out / 'lab.png')
    page.close()
