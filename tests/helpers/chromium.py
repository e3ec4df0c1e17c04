"""Debian's Chromium without a window, and what axe-core says of a page in it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromedriver")
PATIENCE = 60.0  # seconds for a page, on a machine that others use too
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
DESKTOP = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Any]:
    """A driver of a fresh browser, whose profile lies in the folder. Skips the test where there is none, and fails it
    where ALIGN_REQUIRE_BROWSER is set."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    missing += [name for name in ("selenium", "axe_core_python") if importlib.util.find_spec(name) is None]
    if missing:
        sentence = f"there is no {' and no '.join(missing)}: apt-get install chromium chromium-driver"
        (pytest.fail if os.environ.get("ALIGN_REQUIRE_BROWSER") else pytest.skip)(sentence)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which(PROGRAMS[0]) or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--hide-scrollbars", "--no-first-run", f"--user-data-dir={folder}"):  # fmt: skip
        options.add_argument(argument)
    driver = webdriver.Chrome(options, Service(shutil.which(PROGRAMS[1])))
    try:
        driver.set_page_load_timeout(PATIENCE)
        driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})  # as a window in front
        yield driver
    finally:
        driver.quit()


def size(driver: Any, screen: dict[str, Any]) -> None:
    """Show pages as on a screen of this size."""
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def until(condition: Callable[[], Any], said: str = "") -> Any:
    """What a condition gives, as soon as that is something; pages that go meanwhile are no matter."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with contextlib.suppress(WebDriverException):
            if found := condition():
                return found
        time.sleep(0.01)
    raise AssertionError(f"not within {PATIENCE} s: {said}")


def press(driver: Any, *keys: str) -> None:
    """Keys, one after the other, for whatever has the focus; before the page is drawn a browser drops them."""
    from selenium.webdriver import ActionChains

    driver.execute_async_script("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))")
    chain = ActionChains(driver, duration=0)
    for key in keys:
        chain.send_keys(key)
    chain.perform()


def faults(driver: Any) -> list[str]:
    """What axe-core finds serious or critical on the page."""
    import axe_core_python

    source = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    driver.execute_script(source)
    driver.set_script_timeout(PATIENCE)
    found = driver.execute_async_script("axe.run(document).then(arguments[0], e => arguments[0]({error: String(e)}))")
    assert "error" not in found, found
    return [f"{one['id']}: {one['help']} at {[node['html'][:120] for node in one['nodes']]}"
            for one in found["violations"] if one["impact"] in ("serious", "critical")]  # fmt: skip


def overflow(driver: Any) -> int:
    """Pixels by which the page is wider than the screen."""
    return driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
