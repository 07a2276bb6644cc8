"""Runs commands of ``hf-freezecache`` in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from hf_freezecache.cli import app as cli


def call(*args: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr; lets through what a user would see as a traceback."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def assert_one_line(text: str) -> None:
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert "Traceback" not in text
