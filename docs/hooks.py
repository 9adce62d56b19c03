"""A mkdocs hook: links that lead out of docs/ work on the site as they do in the repository.

A page may link to any file of the repository by its relative path, `../benchmarks/README.md` or `../../training_scripts/train_dpo.py`. Such a
file joins the site under `repository/`: Markdown as a page, pictures as they are, other text as a page that shows it. What it links to joins
as well. A link to what is not there is a warning of the build, as within docs/.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
PICTURES = (".png", ".svg", ".jpg")
# [text](target), ![text](target "title"); not inside code
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=[)\s])")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def on_files(files, config):
    """Let what the pages link to join the site."""
    waiting = [(Path(file.abs_src_path).relative_to(ROOT).as_posix(), Path(file.abs_src_path)) for file in files.documentation_pages() if file.abs_src_path]
    joined = set()
    while waiting:
        page, path = waiting.pop()
        for target in {resolved(page, match.group(1)) for match in LINK.finditer(FENCE.sub("", path.read_text(encoding="utf-8")))}:
            if target.startswith(("docs/", "..")) or target in joined or not (ROOT / target).exists():
                continue
            joined.add(target)
            files.append(site_file(target, config))
            if target.endswith(".md"):
                waiting.append((target, ROOT / target))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn the links of a page, written for its place in the repository, into those of its place on the site."""
    place = origin(page.file.src_uri)
    pieces, last = [], 0
    for fence in [*FENCE.finditer(markdown), None]:
        end = fence.start() if fence else len(markdown)
        pieces.append(LINK.sub(lambda match: relinked(place, page.file.src_uri, match), markdown[last:end]))
        if fence:
            pieces.append(fence.group())
            last = fence.end()
    return "".join(pieces)


def resolved(page: str, link: str) -> str:
    """The path in the repository that a page's link leads to."""
    target = os.path.normpath((PurePosixPath(page).parent / link).as_posix()).replace(os.sep, "/")
    folder = ROOT / target
    return f"{target}/README.md" if folder.is_dir() and (folder / "README.md").is_file() else target


def site_uri(target: str) -> str:
    """Where a file of the repository is on the site, as mkdocs counts its sources."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target.endswith("README.md"):
        return f"repository/{target.removesuffix('README.md')}index.md"
    return f"repository/{target}" if target.endswith((".md", *PICTURES)) else f"repository/{target}.md"


def origin(uri: str) -> str:
    """The inverse of `site_uri`, for pages: where the source of one lies in the repository."""
    if not uri.startswith("repository/"):
        return f"docs/{uri}"
    path = uri.removeprefix("repository/")
    return path.removesuffix("index.md") + "README.md" if path.endswith("index.md") else path


def relinked(place: str, uri: str, match: re.Match) -> str:
    target = resolved(place, match.group(1))
    if not (ROOT / target).exists() or target.startswith(".."):
        return match.group()  # mkdocs says which link of which page leads nowhere
    return os.path.relpath(site_uri(target), PurePosixPath(uri).parent).replace(os.sep, "/") + (match.group(2) or "")


def site_file(target: str, config) -> File:
    """A file of the repository as one of the site."""
    path, uri = ROOT / target, site_uri(target)
    if target.endswith(PICTURES):
        return File.generated(config, uri, abs_src_path=str(path))
    content = path.read_text(encoding="utf-8") if target.endswith(".md") else shown(target, path)
    return File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)


def shown(target: str, path: Path) -> str:
    """A page that shows a file, or what is in a folder."""
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if child.is_file() and not child.name.startswith("."))
        return f"# {target}\n\n" + "".join(f"* `{name}`\n" for name in names)
    language = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml"}.get(path.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {target}\n\n````{language}\n{path.read_text(encoding='utf-8')}\n````\n"
