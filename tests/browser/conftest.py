import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from report_runs import HOSTILE, make_family

import train_distill
from timm_pe.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = ('chromium', 'chromium-browser', 'google-chrome')


@pytest.fixture(scope='session')
def chromium() -> Iterator['Browser']:
    """The system's Chromium, headless; that there is none is a failure."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail('no playwright: make test-report installs it', pytrace=False)
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.fail('no Chromium on the PATH: apt-get install --no-install-recommends chromium', pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope='session')
def report(tmp_path_factory) -> Path:
    """The report of a teacher and three seeds of a student without and with it, one class of a hostile name."""
    folder = tmp_path_factory.mktemp('report')
    write_report(make_family(folder / 'runs', seeds=3, class_names=(HOSTILE, 'bee', 'cat')), folder / 'report.html')
    return folder / 'report.html'


@pytest.fixture(scope='session')
def site(tmp_path_factory) -> Path:
    """The documents as `make docs` builds them."""
    folder = tmp_path_factory.mktemp('site')
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet', '--site-dir', str(folder)]
    subprocess.run(command, cwd=Path(train_distill.__file__).parent, check=True)
    return folder


class Visit:
    """A report opened in Chromium: the page, and all it said and asked for."""

    def __init__(self, page: 'Page', path: Path):
        self.page, self.said, self.requests = page, [], []
        page.on('console', lambda message: self.said.append(f'{message.type}: {message.text}'))
        page.on('pageerror', lambda error: self.said.append(str(error)))
        page.on('dialog', lambda dialog: (self.said.append(f'dialog: {dialog.message}'), dialog.dismiss()))
        # below what the browser calls a request: also those that a policy stops, and those of its own
        session = page.context.new_cdp_session(page)
        session.send('Network.enable')
        session.on('Network.requestWillBeSent', lambda event: self.requests.append(event['request']['url']))
        page.goto(path.as_uri(), wait_until='load')
        page.wait_for_timeout(200)


@pytest.fixture
def visit(chromium, report, request) -> Iterator[Visit]:
    """The report on a screen of `(width, height, colour scheme)`."""
    width, height, scheme = getattr(request, 'param', (1280, 800, 'light'))
    context = chromium.new_context(viewport={'width': width, 'height': height}, color_scheme=scheme)
    yield Visit(context.new_page(), report)
    context.close()
