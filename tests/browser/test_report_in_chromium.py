"""The report as a reader sees it. Needs Chromium: `make test-report`."""

import pytest
from report_runs import HOSTILE

SCREENS = [(1280, 800, 'light'), (1280, 800, 'dark'), (360, 740, 'light'), (360, 740, 'dark')]
ON_EVERY_SCREEN = pytest.mark.parametrize('visit', SCREENS, indirect=True, ids=lambda s: f'{s[0]}-{s[2]}')


@ON_EVERY_SCREEN
def test_it_says_nothing_and_asks_for_nothing(visit, report):
    assert visit.said == []
    assert [url for url in visit.requests if not url.startswith('data:')] == [report.as_uri()]


@ON_EVERY_SCREEN
def test_it_shows_its_runs_and_their_numbers(visit):
    page = visit.page
    assert page.title() == 'cifar_resnet20 → test_vit · timm_pe report'
    assert page.locator('h1').is_visible()
    names = page.locator('table.runs tbody th .name').all_inner_texts()
    assert names == ['teacher', *(f'student-{i}' for i in (1, 2, 3)), *(f'student_pe-{i}' for i in (1, 2, 3))]
    assert page.locator('table.means tbody tr').count() == 3
    # the teacher's best epoch, which its students learnt from; its last one has 98.00
    assert page.locator('.tile .big').first.inner_text().startswith('98.50')


@ON_EVERY_SCREEN
def test_every_picture_is_there_and_has_a_size(visit):
    for where, count, height in (
        ('#curves figure svg', 6, 150),
        ('#inside figure svg', 3, 200),  # reliability
        ('#inside figure img', 1, 120),  # projectors, as large as two of them need
        ('#inside .measure .bars', 9, 25),
        ('.sample img', 6, 60),
    ):
        pictures = visit.page.locator(where).all()
        assert len(pictures) == count, where
        for box in (picture.bounding_box() for picture in pictures):
            assert box['width'] >= 60, where
            assert box['height'] >= height, where
    loaded = visit.page.evaluate('[...document.images].map(i => i.complete && i.naturalWidth > 0)')
    assert len(loaded) == 7
    assert all(loaded)


@ON_EVERY_SCREEN
def test_lines_and_bars_have_the_colours_of_their_runs(visit):
    colors = visit.page.evaluate(
        """() => ['.bars .c1 dd span', '.legend .c1'].map((s, i) =>
            getComputedStyle(document.querySelector(s))[['backgroundColor', 'stroke'][i]])"""
    )
    lines = visit.page.evaluate(
        "[...document.querySelectorAll('#curves svg path')].map(p => getComputedStyle(p).stroke)"
    )
    assert colors[0] == colors[1]
    assert colors[0] in lines


@ON_EVERY_SCREEN
def test_the_page_never_scrolls_sideways_and_wide_tables_do_in_their_box(visit):
    inner, scroll = visit.page.evaluate('[window.innerWidth, document.documentElement.scrollWidth]')
    assert scroll <= inner
    boxes = visit.page.evaluate("[...document.querySelectorAll('.scroll')].map(b => [b.clientWidth, b.scrollWidth])")
    assert len(boxes) == 2
    assert all(client <= inner for client, _ in boxes)
    if inner == 360:
        assert all(client < scroll for client, scroll in boxes)


def test_text_can_be_read_on_its_background_in_both_schemes(chromium, report):
    background = {}
    for scheme in ('light', 'dark'):
        context = chromium.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(report.as_uri())
        text, soft, page_color, card = page.evaluate(
            """() => [['body', 'color'], ['.note', 'color'], ['body', 'backgroundColor'], ['.tile', 'backgroundColor']]
                .map(([s, p]) => getComputedStyle(document.querySelector(s))[p].match(/[0-9]+/g).slice(0, 3).map(Number))"""
        )
        label = page.evaluate(
            "getComputedStyle(document.querySelector('#curves svg text')).fill.match(/[0-9]+/g).slice(0, 3).map(Number)"
        )
        context.close()
        background[scheme] = luminance(page_color)
        assert all(contrast(ink, paper) >= 4.5 for ink in (text, soft, label) for paper in (page_color, card))
    assert background['dark'] < 0.05 < 0.7 < background['light']


def luminance(color: list[int]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: list[int], b: list[int]) -> float:
    """Contrast ratio of two sRGB colours, 1 to 21 (WCAG 2)."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_a_class_name_is_shown_and_not_run(visit):
    assert visit.page.locator('.sample .what', has_text=HOSTILE).first.is_visible()
    assert visit.page.locator('script').count() == 0
    assert not [line for line in visit.said if 'dialog' in line]


def test_no_script_would_run_even_if_one_got_in(visit):
    visit.page.evaluate(
        """() => { const s = document.createElement('script'); s.textContent = 'window.ran = true';
            document.body.append(s); const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i) }"""
    )
    visit.page.wait_for_timeout(200)
    assert visit.page.evaluate('window.ran') is None
    assert any('Content Security Policy' in line for line in visit.said)


def test_the_keyboard_reaches_links_tables_and_settings(visit):
    page, reached = visit.page, []
    for _ in range(40):
        page.keyboard.press('Tab')
        reached.append(
            page.evaluate(
                """() => { const e = document.activeElement;
                    return e.className || e.getAttribute('href') || e.tagName.toLowerCase() }"""
            )
        )
    assert reached[0] == 'skip'
    assert {'#results', '#curves', '#inside', '#samples', '#commands', 'scroll', 'summary'} <= set(reached)
    page.locator('summary').first.focus()
    page.keyboard.press('Enter')
    assert page.locator('details[open] pre').count() == 2  # the commands of two more seeds


def test_it_can_be_printed(visit):
    assert visit.page.pdf().startswith(b'%PDF')
    visit.page.emulate_media(media='print')
    assert not visit.page.locator('nav').is_visible()
    assert visit.page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')
