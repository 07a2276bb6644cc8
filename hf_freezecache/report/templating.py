"""Fills in the templates of the report page and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from .text import duration
from .wording import size_words

__all__ = ["fill_template"]


def fill_template(name: str, **values: Any) -> str:
    """Return the text of a template; what goes into an ``.html`` one is escaped.

    Raises:
        jinja2.UndefinedError: The template asks for a value that is not there.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"duration": duration, "size": size_words}
    return environment.get_template(name).render(**values)
