"""The pages as a site: every link leads somewhere, and nothing is loaded from another host."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]' -c constraints.txt")

ROOT = Path(__file__).resolve().parents[2]
INPUTS = (
    "mkdocs.yml",
    "docs",
    "scripts/docs/site_links.py",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
LOADS = {
    "script": "src",
    "img": "src",
    "source": "src",
    "iframe": "src",
    "embed": "src",
    "object": "data",
    "use": "href",
}


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(root / "mkdocs.yml"), "-d", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


class Page(HTMLParser):
    """What a page loads, where its links lead, and the names that a link may end with."""

    def __init__(self, file: Path):
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.names |= {given.get("id", "")}
        if tag in LOADS:
            self.loaded.append(given.get(LOADS[tag], ""))
        if tag == "link" and given.get("rel") not in ("next", "prev", "canonical"):
            self.loaded.append(given["href"])
        if tag == "a":
            self.links.append(given.get("href", ""))
        self.loaded += re.findall(r"url\(([^)]+)\)", given.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {file: Page(file) for file in sorted(site.rglob("*.html"))}


def foreign(addresses: list[str]) -> Iterator[str]:
    yield from (a for a in addresses if urlsplit(a.strip("'\" ")).netloc)


def test_nothing_is_loaded_from_another_host(site, pages):
    assert len(pages) > 15
    for file, page in pages.items():
        assert page.loaded and not list(foreign(page.loaded)), file.name
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert "@import" not in text and not list(foreign(re.findall(r"url\(([^)]+)\)", text))), sheet.name
    for image in site.rglob("*.svg"):
        assert not re.search(r"""(href|src)\s*=\s*["']\s*(https?:)?//""", image.read_text(encoding="utf-8")), image.name


def test_every_link_within_the_site_leads_to_a_page_and_a_heading(site, pages):
    wrong = []
    for file, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or file.name == "404.html":  # that page's links begin at the server's root
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            named = target not in pages or parts.fragment in ("", *pages[target].names)
            if not (target.is_file() and named):
                wrong.append(f"{file.relative_to(site)}: {link}")
    assert not wrong, "\n".join(wrong)


def test_a_broken_link_fails_and_is_named(tmp_path):
    for name in INPUTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ROOT / name, tmp_path / name) if (ROOT / name).is_dir() else shutil.copy(
            ROOT / name, tmp_path / name
        )
    links = "[a](../finetune/gone.py) [b](gone.md) [c](resume.md#gone) [d](../CHANGELOG.md) `[e](none.md)`"
    (tmp_path / "docs/data.md").write_text(f"# Data\n\n{links} [the licence](../README.md) [README.md](../README.md)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "docs/data.md: ../finetune/gone.py is not in the repository" in done.stderr
    assert "'gone.md'" in done.stderr and "#gone" in done.stderr and "none.md" not in done.stderr


def test_links_out_of_the_pages_are_paths_on_the_site(site, pages):
    contributing = (site / "contributing.html").read_text(encoding="utf-8")
    assert "the step (<code>finetune/training/step.py</code>)" not in contributing, "an example in code stays as it is"
    assert "[the step](../finetune/training/step.py)" in contributing
    assert "architecture.html" in pages[site / "contributing.html"].links
    assert "changelog.html" in pages[site / "index.html"].links
    assert "<code>README.md</code>" in (site / "index.html").read_text(encoding="utf-8")
