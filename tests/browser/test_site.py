"""The built site in a real browser: links, search, formulas, pictures, widths; nothing
comes from elsewhere. `make test-browser`."""
import functools
import http.server
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
from axe_playwright_python.sync_playwright import Axe

SITE = Path(__file__).resolve().parents[2] / 'build/docs/html'
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob('*.html'))
CHAPTERS = [p for p in PAGES if p.startswith('nbs/') and p[4].isdigit()]
TOOLS = [p for p in PAGES if p.startswith('nbs/api/')]
OTHERS = ['docs/glossary.html', 'docs/contributing.html', 'docs/references.html',
          'reference/metaunlearn.html', 'reference/runs.html']
READ = ['index.html', *CHAPTERS, *TOOLS, *OTHERS]
LAPTOP, PHONE = dict(width=1280, height=900), dict(width=390, height=1500)


class Page(HTMLParser):
    "Ids and internal links of a page."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *a): pass


@pytest.fixture(scope='module')
def url():
    handler = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


@pytest.fixture
def page(browser, url):
    "A page that remembers errors, failed requests, and requests that left the site."
    context = browser.new_context(viewport=LAPTOP)
    page = context.new_page()
    page.trouble = []
    def heard(message):
        if message.type == 'error': page.trouble.append(f'console: {message.text}')
    def asked(request):
        if not request.url.startswith((url, 'data:', 'blob:')):
            page.trouble.append(f'left the site: {request.url}')
    def answered(response):
        said = f'{response.status}: {response.url}'
        if response.status >= 400: page.trouble.append(said)
    page.on('console', heard)
    page.on('pageerror', lambda e: page.trouble.append(f'script: {e}'))
    page.on('request', asked)
    page.on('response', answered)
    yield page
    context.close()


def visit(page, address):
    page.goto(address)
    page.wait_for_load_state('networkidle')


def targets(page, links):
    "(link, path inside the site, anchor) of a page's links."
    for href in links:
        address, anchor = urldefrag(urljoin(f'http://site/{page}', href))
        if urlparse(address).netloc != 'site': continue
        path = unquote(urlparse(address).path).lstrip('/') or 'index.html'
        yield href, path + 'index.html' * path.endswith('/'), unquote(anchor)


def test_every_internal_link_and_anchor_resolves():
    pages, lost = {p: Page((SITE / p).read_text()) for p in PAGES}, set()
    for p, q in pages.items():
        for href, path, anchor in targets(p, q.links):
            there = (SITE / path).exists()
            known = not anchor or path not in pages or anchor in pages[path].ids
            if not (there and known): lost.add(f'{p}: {href}')
    assert not lost, '\n'.join(sorted(lost)[:30])


@pytest.mark.parametrize('name', READ)
def test_a_page_is_whole(page, url, name):
    visit(page, url + name)
    broken = '[...document.images].filter(i => !i.naturalWidth).map(i => i.src)'
    assert page.evaluate(broken) == [], 'a picture is not there'
    assert page.locator('.math:not(:has(math))').count() == 0, 'a bare formula'
    assert page.locator('.katex-error').count() == 0
    assert page.locator('article h1').count() == 1
    assert page.trouble == []


TOO_WIDE = '''() => {
  for (const d of document.querySelectorAll('details')) d.open = true;
  const end = document.querySelector('article').getBoundingClientRect().right + 1;
  const wide = e => e.scrollWidth > e.clientWidth + 1
    || e.getBoundingClientRect().width > e.parentElement.clientWidth + 1
    || e.getBoundingClientRect().right > end;
  return [...document.querySelectorAll('article pre, article table')].filter(wide)
    .map(e => `${e.tagName} ${e.scrollWidth} in ${e.clientWidth}: `
              + e.innerText.slice(0, 80));
}'''


@pytest.mark.parametrize('name', READ)
def test_code_and_tables_fit_beside_both_sidebars(page, url, name):
    visit(page, url + name)
    assert page.evaluate(TOO_WIDE) == [], 'at 1280 pixels'


@pytest.mark.parametrize('name', ['index.html', CHAPTERS[3], TOOLS[0]])
def test_there_is_one_search_box(page, url, name):
    visit(page, url + name)
    boxes = page.locator('input[type=search], .search-button, .search-button-field')
    shown = [b for b in boxes.all() if b.is_visible()]
    assert len(shown) == 1, [b.evaluate('e => e.outerHTML') for b in shown]
    shown[0].click()
    page.keyboard.type('hypergradient')
    page.keyboard.press('Enter')
    page.wait_for_selector('#search-results li a', timeout=15000)
    assert page.trouble == []


def test_search_finds_the_hypergradient(page, url):
    page.goto(url + 'search.html?q=hypergradient')
    page.wait_for_selector('#search-results li a', timeout=15000)
    found = page.locator('#search-results li a').all_inner_texts()
    assert any('MetaUnlearn' in text for text in found) and page.trouble == []


def test_the_sidebar_numbers_the_chapters_and_names_what_there_is_to_look_up(page, url):
    visit(page, url + 'index.html')
    entries = page.locator('.bd-sidebar-primary .toctree-l1 > a').all_inner_texts()
    numbers = [int(e.split(' · ')[0]) for e in entries if ' · ' in e]
    assert numbers == list(range(len(CHAPTERS)))
    assert {'Glossary', 'Reference', 'Contributing'} <= {*entries}


def test_a_folded_cell_unfolds(page, url):
    visit(page, url + CHAPTERS[3])
    fold = page.locator('.cell details.hide').first
    assert not fold.locator('pre').is_visible()
    fold.locator('summary').click()
    assert fold.locator('pre').is_visible() and page.trouble == []


def test_names_in_code_lead_to_their_definitions(page, url):
    visit(page, url + 'nbs/05_tables.html')
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.locator('.cell_input a', has_text='open_store').first.click()
    assert page.url.startswith(url + 'reference/runs.html#')
    assert page.evaluate('!!document.getElementById(location.hash.slice(1))')
    assert page.trouble == []


def test_names_in_prose_lead_to_their_definitions(page, url):
    visit(page, url + 'docs/contributing.html')
    links = page.locator('article a:has(code)').all()
    assert any('/reference/' in a.evaluate('a => a.href') for a in links)


def test_the_formula_of_tow_is_whole(page, url):
    visit(page, url + 'nbs/api/metrics.html')
    formulas = page.locator('article math').all_text_contents()
    assert any('ToW' in f and '∏' in f for f in formulas)
    assert '{term}' not in page.content()


THEMES = pytest.mark.parametrize('theme', ['light', 'dark'])
BLIND = '''[...document.querySelectorAll('article img')]
  .filter(i => !i.alt || i.alt.startsWith('_images')).map(i => i.src)'''


@THEMES
@pytest.mark.parametrize('name', [*READ, 'search.html'])
def test_everybody_can_read_it(page, url, name, theme):
    "WCAG 2 A and AA by axe: alternative texts, contrast, names of controls, keyboard."
    page.emulate_media(color_scheme=theme)
    visit(page, url + name)
    found = Axe().run(page, options=dict(runOnly=['wcag2a', 'wcag2aa'])).response
    broken = [f'{v["id"]}: {n["html"][:200]}' for v in found['violations']
              for n in v['nodes'][:5]]
    assert not broken, '\n'.join(broken)
    assert page.evaluate(BLIND) == [], 'no alternative text'


@THEMES
@pytest.mark.parametrize('size', [LAPTOP, PHONE], ids=['laptop', 'phone'])
def test_two_widths_and_two_themes(page, url, size, theme):
    page.set_viewport_size(size)
    page.emulate_media(color_scheme=theme)
    out = SITE.parent / 'photographs'
    out.mkdir(exist_ok=True)
    for name in ('index', 'nbs/03_metaunlearn'):
        visit(page, f'{url}{name}.html')
        width = page.evaluate('document.documentElement.scrollWidth')
        assert width <= size['width'] + 1, 'the page itself must not scroll sideways'
        page.screenshot(path=out / f'{Path(name).name}-{size["width"]}-{theme}.png')
