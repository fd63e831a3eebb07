"""What the site has beside its pages (tutorials with outputs, the leaderboard, pages of all methods), and checks of the result.

``DOCS_QUICK=1 mkdocs build`` runs no notebook and writes no leaderboard, for somebody who edits pages.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread costs on networks as small as the notebooks'
sys.path[:0] = [str(ROOT / "docs" / "hooks"), str(ROOT / "benchmarks")]  # scripts, in no package

from checks import broken_links, missed_words  # noqa: E402
from notebooks import as_page, read, run  # noqa: E402

from leaderboard import write_leaderboard  # noqa: E402

FETCHED_SCRIPT = "https://unpkg.com/iframe-worker/shim"
QUICK = bool(os.environ.get("DOCS_QUICK"))
LEAST_HITS = {"WaNet": 3}  # words that the search has to know, and in how many entries at least


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of all methods and the decisions to the navigation."""
    docs = Path(config.docs_dir)
    assert config.nav is not None
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] += [f"methods/{path.name}" for path in sorted((docs / "methods").glob("*.md"))]
        if "Reference" in entry:
            decisions = [f"decisions/{path.name}" for path in sorted((docs / "decisions").glob("*.md"))]
            entry["Reference"].append({"Decisions": decisions})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make a page of each notebook."""
    for path in sorted(Path(config.docs_dir, "tutorials").glob("*.ipynb")):
        name = f"tutorials/{path.stem}.md"
        files.append(File.generated(config, name, content=tutorial_page(path)))
    return files


def tutorial_page(path: Path) -> str:
    """Return the page of a notebook, run in a new folder."""
    cells = read(path)
    if not QUICK:
        before = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                cells = list(run(cells, {"__name__": "__main__"}))
            finally:
                os.chdir(before)
    return as_page(cells, path.name)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to notebooks to their pages; the page of a notebook links to the file itself."""
    kept = markdown.replace(".ipynb){download}", ".ipynb\0").replace(".ipynb)", ".md)")
    return kept.replace(".ipynb\0", ".ipynb){download}")


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Let search work from the disk by a script of ours, in place of one that the theme fetches from elsewhere."""
    return output.replace(FETCHED_SCRIPT, "../" * page.url.count("/") + "assets/frame-worker.js")


def on_post_build(config: MkDocsConfig) -> None:
    """Add the leaderboard; fail on a link that leads nowhere, and on a search that misses what it has to know."""
    site = Path(config.site_dir)
    (site / "404.html").unlink()  # its addresses are those of a server's root, which this site need not have
    if not QUICK:
        write_leaderboard(ROOT / "benchmarks" / "results", site / "leaderboard", ROOT / "tests" / "cards")
    problems = [*broken_links(site, ignored="leaderboard/" if QUICK else None), *missed_words(site, LEAST_HITS)]
    if problems:
        raise PluginError("the site has faults:\n" + "\n".join(problems))
