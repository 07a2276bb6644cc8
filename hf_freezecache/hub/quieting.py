"""Keeps reports of the libraries below to themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_libraries"]


@contextmanager
def quiet_libraries(show_progress: bool = False) -> Iterator[None]:
    """Show only errors of transformers, whose report on loading a head of other classes is long.

    Args:
        show_progress: Leave the progress bars of transformers and datasets as they are, instead of hiding them.
    """
    import datasets  # late: they take longer to load than most of what is done here
    import transformers

    verbosity = transformers.logging.get_verbosity()
    loading, mapping = transformers.logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    if not show_progress:
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if loading:
            transformers.logging.enable_progress_bar()
        if mapping:
            datasets.enable_progress_bars()
