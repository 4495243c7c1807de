"""One headless Chromium for all browser tests: Debian's, or any that is on the PATH."""
import shutil

import pytest
from playwright.sync_api import sync_playwright


@pytest.fixture(scope='session')
def browser():
    names = ('chromium', 'chromium-browser', 'google-chrome')
    found = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=found, args=['--no-sandbox'])
        yield b
        b.close()
