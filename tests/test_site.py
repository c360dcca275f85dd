"The site itself: built from the notebooks as they are, checked, and read in a browser."
import functools, http.server, os, re, shutil, threading
from pathlib import Path
import pytest
pytest.importorskip('pypandoc'), pytest.importorskip('lxml')
from lxml import html
from site_tools import ROOT, build
from links import Checker

CHROMIUM = os.environ.get('CHROMIUM') or shutil.which('chromium')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run',
         '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1'] # no page finds another host
PREFIX = 'some/prefix'  # links are relative: the site works wherever it is put
GROUND, LIGHT, DARK = 'getComputedStyle(document.body).backgroundColor', 'rgb(255, 255, 255)', 'rgb(18, 22, 29)'
PHONE, DESKTOP = {'width': 390, 'height': 844}, {'width': 1440, 'height': 900}

@pytest.fixture(scope='module')
def site(tmp_path_factory)->Path:
    "The folder of the built site, below the root of a server-to-be"
    out = tmp_path_factory.mktemp('www')/PREFIX
    run = build('--out', out, '--strict')
    assert run.returncode == 0, run.stdout + run.stderr
    return out

def pages(site:Path)->list[str]:
    return sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html') if p.name != '404.html')

@functools.cache
def parsed(path:Path)->html.HtmlElement: return html.document_fromstring(path.read_text())

# ---- the files -------------------------------------------------------------------------------------------------------
def test_every_notebook_has_a_page(site):
    notebooks = [p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(x.startswith(('.', '_')) for x in p.relative_to(ROOT/'nbs').parts)]
    assert len(notebooks) == len(pages(site)) and all((site/p.relative_to(ROOT/'nbs')).read_bytes() == p.read_bytes() for p in notebooks)

def test_whatever_is_documented_says_what_it_is(site):
    assert [p.name for p in site.rglob('*.html') if 'Call self as a function' in p.read_text(encoding='utf-8')] == [] # Python's words for a function without any

def test_links_anchors_and_ids(site):
    checker = Checker(site, 'https://rlcr-suite.github.io/rlcr-suite/', 'https://github.com/rlcr-suite/rlcr-suite/blob/main/', ROOT)
    assert len(checker.docs) == len(pages(site)) + 1
    assert checker.check() == []

def test_nothing_comes_from_another_host(site):
    for f in site.rglob('*'):
        if f.suffix in ('.css', '.js') and 'pagefind' not in f.parts: assert not re.search(r'https?://', f.read_text()), f
    for page in pages(site):
        urls = parsed(site/page).xpath('//script/@src | //link/@href | //img/@src | //iframe/@src | //source/@src | //use/@href | //image/@href')
        assert len(urls) > 3 and not [u for u in urls if re.match(r'(https?:)?//', u)], page

def test_every_page_can_be_taken_away(site):
    for page in pages(site):
        hrefs = parsed(site/page).xpath('//ul[@class="actions"]//a/@href')
        assert hrefs[0].endswith('.ipynb') and ((site/page).parent/hrefs[0]).exists()
        assert hrefs[1].startswith('https://colab.research.google.com/github/rlcr-suite/rlcr-suite/blob/main/nbs/')
        assert hrefs[2].startswith('https://github.com/rlcr-suite/rlcr-suite/blob/main/nbs/')

def test_machines_find_every_page(site):
    index, whole, urls = (site/'llms.txt').read_text(), (site/'llms-full.txt').read_text(), (site/'sitemap.xml').read_text()
    for page in pages(site):
        assert f"/rlcr-suite/{page.removesuffix('.html')}.md)" in index and f"/rlcr-suite/{page.removesuffix('index.html')}</loc>" in urls
        title = parsed(site/page).findtext('.//h1')
        assert f'# {title}\n' in whole and (site/page).with_suffix('.md').read_text().startswith(f'# {title}\n')

def test_fonts_come_with_their_licence(site):
    fonts = [f for f in (site/'assets/fonts').iterdir() if f.suffix == '.woff2']
    licence = (site/'assets/fonts/OFL.txt').read_text()
    assert len(fonts) == 7 and all(f.read_bytes()[:4] == b'wOF2' for f in fonts) and 'SIL OPEN FONT LICENSE Version 1.1' in licence
    assert all(name in licence for name in ('Inter', 'Literata', 'JetBrains Mono', 'STIX Two Math')) and sum(f.stat().st_size for f in fonts) < 5e5

# ---- in a browser ----------------------------------------------------------------------------------------------------
class Handler(http.server.SimpleHTTPRequestHandler):
    "As a static host serves it, missing addresses included"
    def log_message(self, *args): pass
    def send_error(self, code, *args):
        if code != 404: return super().send_error(code, *args)
        body = (Path(self.directory)/PREFIX/'404.html').read_bytes()
        self.send_response(404)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

@pytest.fixture(scope='module')
def address(site):
    folder = site.parents[len(Path(PREFIX).parts) - 1]
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/{PREFIX}/'
    server.shutdown()

@pytest.fixture(scope='module')
def browser():
    missing = None if CHROMIUM else 'chromium is not installed (Debian: apt-get install chromium)'
    try: from playwright.sync_api import sync_playwright
    except ImportError: missing = 'playwright is not installed (pip install playwright)'
    if missing and os.environ.get('CI') == 'true': pytest.fail(missing)
    if missing: pytest.skip(missing)
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()

@pytest.fixture
def visit(browser, address):
    "Open a page; whatever goes wrong on it, or is asked of another host, fails the test in the end"
    wrong, contexts = [], []
    def go(page='index.html', viewport=DESKTOP, scheme='light'):
        c = browser.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(c)
        tab = c.new_page()
        tab.on('request', lambda r: None if r.url.startswith((address, 'data:', 'blob:')) else wrong.append(r.url))
        tab.on('console', lambda m: wrong.append(f'console: {m.text}') if m.type in ('error', 'warning') else None)
        tab.on('pageerror', lambda e: wrong.append(f'script: {e}'))
        tab.on('response', lambda r: wrong.append(f'{r.status} {r.url}') if r.status >= 400 else None)
        tab.goto(address + page)
        tab.evaluate('document.fonts.ready')
        return tab
    yield go
    for c in contexts: c.close()
    assert wrong == []

SCORING = '01_rlcr/scoring.html'

def test_search_finds_a_formula_by_its_name(visit, address):
    tab = visit()
    tab.keyboard.press('/')
    tab.keyboard.type('Brier')
    tab.wait_for_selector('.hits a')
    assert 'Brier' in tab.inner_text('.hits') and tab.locator('.hits mark').count()
    tab.keyboard.press('ArrowDown')
    assert tab.evaluate('document.activeElement.closest(".hits") !== null'), 'the arrow goes to the first result'
    tab.keyboard.press('Enter')
    tab.wait_for_url(lambda url: url != address + 'index.html')
    assert 'Brier' in tab.inner_text('main')

def test_search_says_when_it_finds_nothing_and_closes(visit):
    tab = visit()
    tab.click('#page-search')
    tab.keyboard.insert_text('☃')
    tab.wait_for_function("document.querySelector('.hits').textContent.includes('Nothing found')")
    tab.keyboard.press('Escape')
    assert not tab.locator('#page-finder').is_visible()

@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_theme_follows_the_system_then_the_reader(visit, scheme):
    tab = visit(scheme=scheme)
    ground = lambda: tab.evaluate(GROUND)
    before, after = (LIGHT, DARK) if scheme == 'light' else (DARK, LIGHT)
    assert ground() == before
    tab.click('#page-theme')
    assert ground() == after
    tab.reload()
    assert ground() == after, 'the choice is kept'
    tab.goto(tab.url.replace('index.html', SCORING))
    assert ground() == after, 'and goes with the reader'

def test_equations_are_drawn(visit):
    tab = visit(SCORING)
    boxes = tab.evaluate("[...document.querySelectorAll('article math')].filter(m => m.checkVisibility() && !m.closest('details:not([open])')).map(m => { const b = m.getBoundingClientRect(); return b.width*b.height })")
    assert len(boxes) > 20 and min(boxes) > 0
    assert tab.evaluate("document.fonts.check('16px \"STIX Two Math\"')") and tab.evaluate("[...document.fonts].some(f => /STIX/.test(f.family) && f.status === 'loaded')")
    a, b = tab.evaluate("(() => { const f = document.querySelector('mfrac').children; return [f[0].getBoundingClientRect().bottom, f[1].getBoundingClientRect().top] })()")
    assert a <= b + 1, 'a numerator stands above its denominator: it is mathematics, not text'

def test_code_can_be_copied(visit, browser):
    tab = visit(SCORING)
    tab.context.grant_permissions(['clipboard-read', 'clipboard-write'])
    block = tab.locator('div.sourceCode').first
    block.hover()
    block.locator('.copy').click()
    tab.wait_for_selector('.copy:text("Copied")')
    assert tab.evaluate('navigator.clipboard.readText()').strip() == block.locator('code').inner_text().strip()

def test_the_menu_opens_on_a_phone(visit):
    tab = visit(SCORING, PHONE)
    assert not tab.locator('.side').is_visible() and tab.get_attribute('#page-menu', 'aria-expanded') == 'false'
    tab.click('#page-menu')
    assert tab.locator('.side [aria-current=page]').is_visible() and tab.get_attribute('#page-menu', 'aria-expanded') == 'true'
    box = tab.locator('.side').bounding_box()
    assert box['width'] == PHONE['width'] and box['y'] + box['height'] == PHONE['height'], 'it covers the page'
    tab.keyboard.press('Escape')
    assert not tab.locator('.side').is_visible()
    tab.click('#page-menu')
    tab.click('.side a[href$="index.html"]')
    tab.wait_for_url('**/index.html')

OVERFLOW = """() => { const w = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= w) return [];
  return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > w + 1).map(e => e.outerHTML.slice(0, 120)).slice(0, 3) }"""

CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true}), known = new Map();
  const rgba = c => { if (!known.has(c)) { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); known.set(c, [...canvas.getImageData(0, 0, 1, 1).data]) } return known.get(c) };
  const light = c => { const [r, g, b] = rgba(c).map(v => (v /= 255) <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (rgba(c)[3] === 255) return c } return getComputedStyle(document.body).backgroundColor };
  const poor = new Map(), seen = new Set();
  for (const e of document.querySelectorAll('body *')) {
    const pre = e.closest('pre'), kind = pre && `${pre.parentElement.className} ${pre.className} ${e.parentElement.className} ${e.className}`;
    if (pre) { if (seen.has(kind)) continue; seen.add(kind) }  // thousands of tokens of code, of a few kinds
    if (!e.checkVisibility({opacityProperty: true, visibilityProperty: true}) || e.closest('svg, .skip') || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const s = getComputedStyle(e), [a, b] = [light(s.color), light(ground(e))].sort((x, y) => x - y), ratio = (b + .05)/(a + .05);
    const large = parseFloat(s.fontSize) >= 24 || (parseFloat(s.fontSize) >= 18.66 && s.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) poor.set(`${e.tagName}.${e.className} ${s.color} on ${ground(e)}`, ratio.toFixed(2));
  }
  return [...poor];
}"""

def test_every_page_fits_and_stands_out(visit, address, site):
    """Light on a desktop, dark on a phone: nothing is wider than the screen, and every piece of text has the contrast of WCAG 2 AA. Visiting all pages
    also shows that none logs an error or asks another host for anything"""
    tab, grounds = visit(), set()
    for page in pages(site):
        tab.goto(address + page)
        tab.evaluate('document.fonts.ready')
        for viewport, scheme in ((DESKTOP, 'light'), (PHONE, 'dark')):
            tab.set_viewport_size(viewport)
            tab.emulate_media(color_scheme=scheme)
            assert tab.evaluate(OVERFLOW) == [], (page, scheme)
            assert tab.evaluate(CONTRAST) == [], (page, scheme)
            grounds.add((scheme, tab.evaluate(GROUND)))
    assert grounds == {('light', LIGHT), ('dark', DARK)}

def test_every_width_holds_the_bar_at_the_top(visit):
    tab = visit()
    for width in range(320, 1500, 60):
        tab.set_viewport_size({'width': width, 'height': 800})
        assert tab.evaluate(OVERFLOW) == [], width

def test_a_wrong_address_leads_home(browser, address):
    tab = browser.new_page()
    response = tab.goto(address + 'no/such/page.html')
    assert response.status == 404 and tab.locator('a').get_attribute('href') == 'https://rlcr-suite.github.io/rlcr-suite/'
    tab.close()

def test_pages_can_be_read_without_a_script_and_without_a_server(browser, site):
    c = browser.new_context(java_script_enabled=False, viewport=DESKTOP, color_scheme='dark')
    tab = c.new_page()
    tab.goto((site/SCORING).as_uri())
    assert tab.locator('article h1').is_visible() and tab.locator('.side [aria-current=page]').is_visible()
    tab.click('.pager [rel=next]')
    assert tab.url.startswith('file:') and tab.locator('article h1').is_visible()
    c.close()
