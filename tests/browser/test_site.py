"""The built site in a real browser: links, search, formulas, pictures; nothing comes from elsewhere. `make test-browser`."""
import http.server, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest
from axe_playwright_python.sync_playwright import Axe

SITE = Path(__file__).resolve().parents[2] / 'build/docs/html'
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob('*.html'))
CHAPTERS = [p for p in PAGES if p[:2].isdigit() or p == 'index.html']


class Page(HTMLParser):
    "Ids and internal links of a page."
    def __init__(self, text): super().__init__(); self.ids, self.links = set(), []; self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs); self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])


@pytest.fixture(scope='module')
def url():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a, **k): super().__init__(*a, directory=str(SITE), **k)
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'; server.shutdown()


@pytest.fixture
def page(browser, url):
    "A page that remembers what went wrong: console errors, failed requests, requests that left the site."
    context = browser.new_context(); page = context.new_page(); page.trouble = []
    page.on('console', lambda m: page.trouble.append(f'console: {m.text}') if m.type == 'error' else None)
    page.on('pageerror', lambda e: page.trouble.append(f'script: {e}'))
    page.on(
        'request',
        lambda r: None if r.url.startswith((url, 'data:', 'blob:')) else page.trouble.append(f'left the site: {r.url}'),
    )
    page.on('response', lambda r: page.trouble.append(f'{r.status}: {r.url}') if r.status >= 400 else None)
    yield page; context.close()


def test_every_internal_link_and_anchor_resolves():
    pages = {p: Page((SITE / p).read_text()) for p in PAGES}; lost = []
    for p, q in pages.items():
        for href in q.links:
            target, anchor = urldefrag(urljoin(f'http://site/{p}', href))
            if urlparse(target).netloc != 'site': continue
            path = unquote(urlparse(target).path).lstrip('/') or 'index.html'
            path += 'index.html' * path.endswith('/')
            if not (SITE / path).exists(): lost.append(f'{p}: {href}')
            elif anchor and path in pages and unquote(anchor) not in pages[path].ids:
                lost.append(f'{p}: {href} (anchor)')
    assert not lost, '\n'.join(sorted(set(lost))[:30])


@pytest.mark.parametrize('name', CHAPTERS + ['glossary.html', 'references.html', 'reference/metaunlearn.html'])
def test_a_page_is_whole(page, url, name):
    page.goto(url + name); page.wait_for_load_state('networkidle')
    assert page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)") == []
    assert (
        page.evaluate("[...document.querySelectorAll('.math')].filter(m => !m.querySelector('math')).length") == 0
    ), 'a formula is not rendered'
    assert page.evaluate("document.querySelectorAll('.katex-error').length") == 0 and page.locator('article h1').count() == 1
    assert page.trouble == []


@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('name', CHAPTERS + ['glossary.html', 'references.html', 'reference/metaunlearn.html', 'api/explore.html', 'search.html'])
def test_everybody_can_read_it(page, url, name, theme):
    "WCAG 2 A and AA by axe: alternative texts, contrast, names of controls, keyboard reach."
    page.emulate_media(color_scheme=theme); page.goto(url + name); page.wait_for_load_state('networkidle')
    found = Axe().run(page, options=dict(runOnly=['wcag2a', 'wcag2aa'])).response['violations']
    assert not found, '\n'.join(f'{v["id"]}: {n["html"][:200]}' for v in found for n in v['nodes'][:5])
    blind = page.evaluate(
        "[...document.querySelectorAll('article img')].filter(i => !i.alt || i.alt.startsWith('_images')).map(i => i.src)"
    )
    assert not blind, f'no alternative text: {blind}'


def test_names_in_code_lead_to_their_definitions(page, url):
    page.goto(url + '03_metaunlearn.html')
    page.locator('.cell_input a', has_text='simulate_requests').first.click()
    assert (
        page.url.startswith(url + 'reference/data.html#')
        and page.evaluate("!!document.getElementById(location.hash.slice(1))")
        and page.trouble == []
    )


def test_search_finds_the_hypergradient(page, url):
    page.goto(url + 'search.html?q=hypergradient')
    page.wait_for_selector('#search-results li a', timeout=15000)
    assert any('MetaUnlearn' in t for t in page.locator('#search-results li a').all_inner_texts()) and page.trouble == []


@pytest.mark.parametrize('width', [1300, 390])
@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_two_widths_and_two_themes(page, url, width, theme, request):
    page.set_viewport_size(dict(width=width, height=1500))
    page.emulate_media(color_scheme=theme)
    page.goto(url + 'index.html')
    page.wait_for_load_state('networkidle')
    assert page.evaluate('document.documentElement.scrollWidth') <= width + 1, 'the page itself must not scroll sideways'
    out = SITE.parent / 'photographs'
    out.mkdir(exist_ok=True)
    page.screenshot(path=out / f'index-{width}-{theme}.png')
    page.goto(url + '03_metaunlearn.html')
    page.screenshot(path=out / f'03-{width}-{theme}.png')
