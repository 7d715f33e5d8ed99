"""The page of `lightrm serve` in a real browser: does it score, rank, escape, and take nothing from elsewhere?

    python -m benchmarks.clients.browser [--chromium PATH]

Needs Chromium and `pip install playwright`. The page is filled in and sent as a person would; answers that look like
markup must stay text. Writes results/browser.json and the sentence in the documents.
"""

from __future__ import annotations

import argparse
import shutil
from typing import Any

import lightrm
from benchmarks.clients.load import server
from benchmarks.record import measured_on, provenance, quote, write_result

PROMPT = "How do I boil an egg?"
ANSWERS = [
    "Put it in hot water for ten minutes.",
    "No.",
    "<img src=x onerror=\"document.title='owned'\"> <b>bold</b> 蛋",
]
KEY = "0123456789abcdef"


def used(page: Any, port: int, key: str = "") -> list[list[str]]:
    """Fill in the form, send it, and return the rows of the ranking."""
    page.goto(f"http://127.0.0.1:{port}/")
    page.fill("#prompt", PROMPT)
    page.fill("#key", key)
    while page.locator(".answer").count() < len(ANSWERS):
        page.click("#more")
    for k, answer in enumerate(ANSWERS):
        page.locator(".answer").nth(k).fill(answer)
    page.click("button[type=submit]")
    page.locator("#ranking:not([hidden]), #problem:not(:empty)").first.wait_for()
    rows = page.locator("#ranking tbody tr")
    return [rows.nth(k).locator("td").all_text_contents() for k in range(rows.count())]


def checked(browser: Any) -> dict[str, bool]:
    scores = lightrm.load("demo").score(PROMPT, ANSWERS)
    expected = [[f"{scores[k]:.4f}", ANSWERS[k]] for k in sorted(range(len(ANSWERS)), key=lambda k: -scores[k])]
    found: dict[str, bool] = {}
    said: list[str] = []
    with server() as port:
        page = browser.new_page(color_scheme="dark")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        found["the ranking is the library's, to 4 digits"] = used(page, port) == expected
        found["markup in an answer stays text"] = (
            page.title() == "lightrm" and page.locator("tbody b, tbody img").count() == 0
        )
        found["nothing is fetched from elsewhere"] = all(url.startswith(f"http://127.0.0.1:{port}/") for url in asked)
        light = browser.new_page(color_scheme="light")
        used(light, port)
        found["a dark and a light page differ"] = page.screenshot() != light.screenshot()
        page.fill("#prompt", "x" * 9_000_000)
        page.click("button[type=submit]")
        page.locator("#problem:not(:empty)").wait_for()
        found["a refusal is shown"] = "at most 8388608 bytes" in page.locator("#problem").text_content()
    found["the browser complains of nothing else"] = all("413" in line for line in said)
    with server("--api-key", KEY) as port:
        page = browser.new_page()
        found["without the key there is no score"] = used(page, port) == []
        found["with the key there is"] = used(page, port, KEY) == expected
    return found


def sentence(result: dict[str, Any]) -> str:
    held = [name for name, holds in result["checks"].items() if holds]
    failed = [name for name, holds in result["checks"].items() if not holds]
    wrong = f" Not so: {'; '.join(failed)}." if failed else ""
    return f"In {result['browser']}: {'; '.join(held)}.{wrong} {measured_on(result)}\n"


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    path = parser.parse_args().chromium
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        result = {
            **provenance(("torch", "starlette", "uvicorn", "playwright")),
            "browser": f"headless Chromium {browser.version}",
            "checks": checked(browser),
        }
        browser.close()
    write_result("browser", result)
    quote("browser", sentence)


if __name__ == "__main__":
    main()
