"""A real browser without a window, and what a page's test asks of it."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--force-device-scale-factor=1",
)  # fmt: skip
# Of every element with text of its own: the colour, and the first ground behind it that is not transparent.
_TEXTS = """
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = new Map();
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || found.has(element) || !element.checkVisibility()) continue;
  if (["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  const svg = element.closest("svg");
  let ground = svg ? svg.parentElement : element;
  while (ground && getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
  const style = getComputedStyle(element);
  found.set(element, [svg ? style.fill : style.color, getComputedStyle(ground || document.body).backgroundColor,
    (svg ? "svg " : "") + element.tagName + " " + walker.currentNode.data.trim().slice(0, 40)]);
}
return [...found.values()];
"""
# Where the page, or an element in it that does not scroll by itself, is wider than the window.
_WIDE = """
const width = document.documentElement.clientWidth;
const wide = document.documentElement.scrollWidth > width ? ["page " + document.documentElement.scrollWidth] : [];
for (const element of document.querySelectorAll("body *")) {
  if (element.closest("svg") || element.closest(".scroll") || !element.checkVisibility()) continue;
  if (element.getBoundingClientRect().right > width + 1) wide.push(element.tagName + "." + element.className);
}
return wide;
"""


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Headless Chromium with its profile and downloads under `folder`; the test is skipped where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver, and one of them is not on the PATH")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, in the extra `test`")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.add_argument("--force-prefers-reduced-motion")
    options.add_experimental_option("prefs", {"profile.default_content_setting_values.automatic_downloads": 1})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    downloads = {"behavior": "allow", "downloadPath": str(folder / "downloads")}
    running.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
    running.get("about:blank")  # else the first page's log has what the browser's own start page asks for
    running.set_page_load_timeout(300)
    running.set_script_timeout(300)
    try:
        yield Browser(running, folder)
    finally:
        running.quit()


class Browser:
    """Selenium's driver, and questions about the page that it shows."""

    def __init__(self, driver, folder: Path) -> None:
        self.driver = driver
        self.folder = folder

    def open(self, page: Path, width: int = 1280, height: int = 800, *, dark: bool = False) -> None:
        """Load a file in a window of this size, in light or dark mode."""
        self.resize(width, height)
        self.set_dark(dark)
        self.driver.get(page.as_uri())

    def resize(self, width: int, height: int) -> None:
        """The size of the page's window."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def set_dark(self, dark: bool) -> None:
        """What `prefers-color-scheme` says."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def run(self, script: str, *arguments):
        """The value that a script returns."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list:
        """Elements by CSS selector."""
        return self.driver.find_elements("css selector", selector)

    def complaints(self) -> list[str]:
        """Messages in the console since the last call: errors, and warnings too."""
        entries = self.driver.get_log("browser")
        return [f"{entry['level']} {entry['message']}" for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def requested(self) -> list[str]:
        """Addresses that the page asked for since the last call, from the performance log."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def wide(self) -> list[str]:
        """What sticks out of the window to the right and does not scroll in a box of its own."""
        return self.run(_WIDE)

    def contrasts(self) -> list[tuple[float, str, str]]:
        """Contrast (WCAG 2) of every visible text with the ground behind it, the text, its colour; the least first.

        The ground of a text in a figure is the page's, whatever the figure has drawn there.
        """
        texts = self.run(_TEXTS)
        return sorted((contrast(_rgb(ink), _rgb(ground)), label, ink) for ink, ground, label in texts)

    def screenshot(self, name: str, *, full: bool = False) -> Path:
        """What the window shows, or the whole page, as a PNG under the folder."""
        options = {"format": "png", "captureBeyondViewport": full}
        if full:
            size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        path = self.folder / f"{name}.png"
        path.write_bytes(base64.b64decode(data))
        return path


def contrast(ink: tuple[float, ...], ground: tuple[float, ...]) -> float:
    """(L1 + 0.05) / (L2 + 0.05) of relative luminances, https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""
    light, dark = sorted((_luminance(ink), _luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(text: str) -> tuple[float, ...]:
    kind, _, numbers = text.rstrip(")").partition("(")
    parts = [float(part) for part in numbers.replace(",", " ").replace("/", " ").split()]
    assert kind in ("rgb", "rgba"), text
    assert kind == "rgb" or parts[3] == 1.0, f"can't judge a ground that shines through: {text}"
    return tuple(parts[:3])
