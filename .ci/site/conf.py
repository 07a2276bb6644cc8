"""Sphinx's settings for the pages: README.md and docs/ as a site. ``python -m sphinx -b html -c .ci/site . build/site`` makes it."""

from __future__ import annotations

project = "hf_freezecache"
author = "the contributors of hf_freezecache"
extensions = ["myst_parser"]
root_doc = ".ci/site/index"
include_patterns = [
    ".ci/site/index.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "recipes/README.md",
    "model_cards/README.md",
    "model_cards/*/README.md",
    "docs/**",
]
myst_heading_anchors = 4
# A card's own header says who made it for the Hub; here it stands beside the pages that link to it.
suppress_warnings = ["toc.not_included", "myst.header"]
html_theme = "furo"
html_title = "hf_freezecache"
html_copy_source = False
html_show_copyright = False
