"""Hooks of mkdocs: README and its neighbours as pages of the site, and links out of docs/ that work there.

A page's links are relative to its place in the repository, as GitHub reads them. Here they are rewritten to the page or
file of the site; a file outside docs/ is copied to the site once a page links to it.
"""

import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the site, by files at the root of the repository."""
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")

log = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files at the root of the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    sources = {page: source for source, page in PAGES.items()}
    uri = page.file.src_uri
    folder = posixpath.dirname(sources.get(uri, f"docs/{uri}"))

    def rewritten(link: re.Match[str]) -> str:
        if ":" in link[0] or link[0].startswith("/"):
            return link[0]
        target = posixpath.normpath(posixpath.join(folder, link[0]))
        if not (ROOT / target).is_file():
            log.warning(f"{uri} links to {link[0]}, which is not a file of the repository")
            return link[0]
        return posixpath.relpath(site_uri(target, config, files), posixpath.dirname(uri))

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(rewritten, text) for text in parts[::2]]
    return "".join(parts)


def site_uri(target: str, config: MkDocsConfig, files: Files) -> str:
    """Where the site has a file of the repository; copies it there if it is not in docs/."""
    if target in PAGES:
        return PAGES[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    uri = f"repository/{target}"
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
    return uri
