"""Builds the API reference out of the docstrings: ``python .ci/docs.py FOLDER``, then open ``FOLDER/index.html``.

Warnings are errors, and every public name of these modules must be on its page with a docstring.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

#: What users may import. The rest of the package may change without notice.
MODULES = [
    "hf_freezecache",
    *(
        f"hf_freezecache.{name}"
        for name in (
            *("config", "schedules", "dataset", "errors", "codecs"),
            *("model.split", "model.suffix", "data.image_transform", "data.feature_augmentation", "data.sampler"),
            *("data.hashing", "model.hashing", "cache.reader", "cache.verify", "cache.index", "cache.fingerprint"),
            *("distributed.process_group", "compression.sensitivity", "report.callback", "report.figures"),
            *("hub.client", "hub.push", "hub.pull"),
        )
    ),
]


def missing(folder: Path) -> list[str]:
    """Return the public names that the built pages lack, or show without a docstring."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        path = folder / f"{name.replace('.', '/')}.html"
        page = path.read_text(encoding="utf-8") if path.is_file() else ""
        for public in module.__all__:
            value = getattr(module, public)
            start = page.find(f'<section id="{public}">')
            section = page[start : page.find("</section>", start)] if start >= 0 else ""
            documented = inspect.isclass(value) or inspect.isfunction(value)
            if not section or (documented and not re.search(r'<div class="docstring">\s*<p>', section)):
                found.append(f"{name}.{public}")
    return found


def main(folder: Path) -> int:
    """Build the pages; return the exit status."""
    command = [sys.executable, "-W", "error", "-m", "pdoc", "--docformat", "google", "--no-show-source"]
    subprocess.run([*command, "--output-directory", str(folder), *MODULES], check=True)
    absent = missing(folder)
    for name in absent:
        print(f"{name} is not on its page, or has no docstring there", file=sys.stderr)
    print(f"{folder / 'index.html'}: {len(MODULES)} modules")
    return 1 if absent else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
