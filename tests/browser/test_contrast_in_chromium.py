"""Report and documents on a phone and a desk, light and dark: nothing is cut off, and all text can be read."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from axe_playwright_python.sync_playwright import Axe

SCREENS = [(390, 844, 'light'), (390, 844, 'dark'), (1280, 800, 'light'), (1280, 800, 'dark')]
PAGES = ['index.html', 'results/index.html', 'benchmarks/results/step_time/index.html', 'guide/own-data/index.html']
# what axe-core calls the rules of what a reader can see
RULES = ['color-contrast', 'image-alt', 'svg-img-alt', 'scrollable-region-focusable', 'heading-order', 'document-title']


@pytest.fixture
def page(chromium, request):
    """A page of the browser on a screen of `(width, height, colour scheme)`."""
    width, height, scheme = request.param
    context = chromium.new_context(viewport={'width': width, 'height': height}, color_scheme=scheme)
    yield context.new_page()
    context.close()


ON_EVERY_SCREEN = pytest.mark.parametrize('page', SCREENS, indirect=True, ids=lambda s: f'{s[0]}-{s[2]}')


def check(page, within: str) -> list[str]:
    """What axe-core finds of RULES, and what stands out of the page or is cut off."""
    options = {'runOnly': {'type': 'rule', 'values': RULES}}
    violations = Axe().run(page, context={'include': [within]}, options=options).response['violations']
    wrong = [f'{v["id"]}: {node["html"][:120]}' for v in violations for node in v['nodes']]
    inner, scroll = page.evaluate('[window.innerWidth, document.documentElement.scrollWidth]')
    if scroll > inner:
        wrong.append(f'the page is {scroll} wide on {inner}')
    # text in a box that neither wraps nor scrolls
    wrong += page.evaluate(
        """within => [...document.querySelectorAll(within + ' *')].filter(e =>
            e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX == 'hidden' && e.innerText &&
            getComputedStyle(e).position != 'absolute' && e.clientWidth > 1)
            .map(e => 'cut off: ' + e.outerHTML.slice(0, 120))""",
        within,
    )
    return wrong


@ON_EVERY_SCREEN
def test_the_report_can_be_read(page, report):
    page.goto(report.as_uri())
    assert check(page, 'body') == []


@ON_EVERY_SCREEN
@pytest.mark.parametrize('name', PAGES)
def test_a_page_of_the_site_can_be_read(page, name, site):
    page.goto((site / name).as_uri(), wait_until='load')
    page.wait_for_timeout(200)
    assert check(page, '.md-content') == []


@pytest.mark.parametrize('page', [(390, 844, 'light')], indirect=True)
@pytest.mark.parametrize(
    ('name', 'chart'), [(PAGES[0], 'curves.svg'), (PAGES[1], 'accuracy.svg'), (PAGES[2], 'step_time.svg')]
)
def test_the_labels_of_a_chart_have_nine_pixels_on_a_phone(page, name, chart, site):
    page.goto((site / name).as_uri())
    shown = page.locator(f'img[src$="{chart}"]').bounding_box()['width']
    page.goto((site / 'figures' / chart).as_uri())
    own = page.evaluate('document.documentElement.viewBox.baseVal.width')
    sizes = page.evaluate("[...document.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize))")
    assert min(sizes) * shown / own >= 9


@pytest.fixture(scope='module')
def served(site):
    """Address of the site: its search needs a server."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/index.html'
    server.shutdown()


@pytest.mark.parametrize('page', [(390, 844, 'light')], indirect=True)
@pytest.mark.parametrize(
    ('words', 'found'),
    [('--teacher-cache', 'Teacher cache'), ('--resume auto', 'Stopping and resuming'), ('create_model', 'In Python')],
)
def test_the_search_finds_flags_as_they_are_written(page, served, words, found):
    page.goto(served)
    page.locator('label[for=__search]').first.click()
    page.locator('[data-md-component=search-query]').press_sequentially(words)
    results = page.locator('[data-md-component=search-result] .md-search-result__item')
    page.wait_for_timeout(1000)  # while it is typed there are other results
    results.first.wait_for(timeout=10_000)
    assert found in ' '.join(results.nth(i).inner_text() for i in range(min(3, results.count())))


@pytest.mark.parametrize('page', [(1280, 800, 'light')], indirect=True)
def test_no_command_goes_on_beyond_the_edge_of_its_block(page, site):
    for name in PAGES:
        page.goto((site / name).as_uri())
        wide = page.evaluate(
            "[...document.querySelectorAll('.md-content pre > code')].filter(c => c.scrollWidth > c.clientWidth + 1).length"
        )
        assert wide == 0, name
