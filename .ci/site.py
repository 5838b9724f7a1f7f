"""Hooks of the documentation site: results as pages, links between folders, formulas as MathML."""

from __future__ import annotations

import os
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)]*)?\)")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures of experiments/ to those of docs/."""
    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.suffix in (".md", ".png"):
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links into the repository at the pages of the site.

    The leaderboard's page also gets its tables.
    """
    folder = Path(page.file.abs_src_path or ROOT).parent
    here = Path(page.file.src_uri).parent

    def site_link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups(default="")
        path = Path(os.path.normpath(folder / target))
        if path.is_relative_to(ROOT / "docs"):
            place = path.relative_to(ROOT / "docs")
        elif path.is_relative_to(ROOT):
            place = path.relative_to(ROOT)
        else:
            return match[0]
        if files.get_file_from_path(place.as_posix()):
            return f"[{text}]({Path(os.path.relpath(place, here)).as_posix()}{anchor})"
        if path.exists():  # a file of the repository that is no page
            return text
        return match[0]

    if here.as_posix() == "experiments/leaderboard" and page.file.name == "index":
        tables = (path for path in sorted(folder.glob("*.md")) if path.name != "README.md")
        markdown += "".join(_leaderboard(table) for table in tables)
    parts = CODE.split(markdown)
    texts = [LINK.sub(site_link, part) if not part.startswith("`") else part for part in parts]
    return "".join(texts)


def _leaderboard(table: Path) -> str:
    picture = f"![{table.stem}: PSNR against planning time]({table.stem}.png)"
    return f"\n## {table.stem}\n\n{picture}\n\n{table.read_text()}\n"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn TeX into MathML, which browsers draw without a script."""

    def mathml(match: re.Match[str]) -> str:
        display = "inline" if match[2] == "(" else "block"
        return convert(unescape(match[3]).strip(), display=display)

    return FORMULA.sub(mathml, html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would fetch something from elsewhere."""
    if match := re.search(
        r'(<script[^>]* src|<link[^>]* href|<img[^>]* src)="?(https?:)?//[^"> ]*', output
    ):
        raise PluginError(f"{page.file.src_uri} loads {match[0]}")
    return output
