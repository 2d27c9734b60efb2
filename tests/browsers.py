"""Headless Chromium from the system's packages, driven by Selenium; .ci/run installs it."""

import json
import shutil
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait


@contextmanager
def chromium(folder):
    """A browser for one module: `get` a file, click, read. Fails where Chromium is missing."""
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    assert binary and driver, "no Chromium: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-extensions", "--force-color-profile=srgb",
        "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield browser
    finally:
        browser.quit()


def resize(browser, width, height=900, *, dark=False):
    """Set the size that a page sees, also below the narrowest window that Chromium makes."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def open_page(browser, path, ready="body"):
    """Load a file, and wait for an element."""
    browser.get(path.as_uri())
    WebDriverWait(browser, 60).until(lambda page: page.find_elements(By.CSS_SELECTOR, ready))


def complaints(browser):
    """What the console says since the last call: errors of scripts, and what the policy refused."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requested(browser):
    """Addresses asked for since the last call, but for files and data within the page."""
    urls = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            urls.append(message["params"]["request"]["url"])
    browsers_own = ("chrome:", "chrome-untrusted:", "about:")  # such as its start page
    own = ("file:", "data:", *browsers_own)
    return [url for url in urls if not url.startswith(own)]


def width_of(browser):
    """Width that the page takes: more than the screen's where something sticks out."""
    return browser.execute_script("return document.documentElement.scrollWidth")


def text_of(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector).text
