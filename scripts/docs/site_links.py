"""A hook of mkdocs: one way to write a link serves both the repository's pages and the site.

A page links to a file of the repository by its path from the page, as the repository's own view wants it. On the site
a page of docs/, or one of ROOT_PAGES, is a page; any other file is named by its path, because the site does not know
where the repository is served. A file that does not exist is a warning, which `mkdocs build --strict` makes a failure.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
ROOT_PAGES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)  # they lie where people look for them, and belong to the site
_CODE = re.compile(r"^(```|~~~).*?^\1[ \t]*$|`[^`\n]*`", re.DOTALL | re.MULTILINE)  # a link in there is none
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.plugins.site_links")  # below this name warnings count under --strict


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in ROOT_PAGES:
        files.append(File.generated(config, _site_name(name), content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    source = next((name for name in ROOT_PAGES if _site_name(name) == page.file.src_uri), f"docs/{page.file.src_uri}")
    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_rewritten(markdown[end : code.start()], source, page.file.src_uri), code[0]]
        end = code.end()
    return "".join(parts) + _rewritten(markdown[end:], source, page.file.src_uri)


def _rewritten(text: str, source: str, uri: str) -> str:
    """`text` with its links as the site wants them. `source`: the page in the repository; `uri`: in the site."""

    def link(match: re.Match[str]) -> str:
        said, target, anchor = match["text"], match["target"], match["anchor"] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = os.path.normpath(PurePosixPath(source).parent / target)
        if path in ROOT_PAGES or path.startswith("docs/"):
            there = _site_name(path) if path in ROOT_PAGES else path.removeprefix("docs/")
            return f"{match['image']}[{said}]({os.path.relpath(there, PurePosixPath(uri).parent)}{anchor})"
        if path.startswith("..") or not (ROOT / path).exists():
            log.warning(f"{source}: {target} is not in the repository. Give its path from {source}.")
        return f"`{path}`" if said.strip("`") in (path, Path(path).name) else f"{said} (`{path}`)"

    return _LINK.sub(link, text)


def _site_name(root_page: str) -> str:
    return root_page.lower()
