"""What all commands share: errors as one message and an exit code, and the console."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import typer

from treelora.errors import TreeLoRAError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 1, 2, 130
WIDTH_OF_A_FILE = 170


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our own errors into one message and an exit code; a bug still shows its traceback."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        from treelora_platform.run import RunFailedError

        try:
            command(*args, **kwargs)
        except RunFailedError as error:
            fail(str(error), EXIT_FAILED)
        except TreeLoRAError as error:
            fail(str(error), EXIT_REFUSED)
        except KeyboardInterrupt:
            fail("interrupted; the same command goes on from the last commit", EXIT_INTERRUPTED)

    return wrapper


def fail(message: str, code: int) -> None:
    """Say what is wrong, and end with that code."""
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(code)


def make_console() -> Console:
    """Lines are wrapped on a terminal only, so that a log can be searched; tables in a file have room."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(soft_wrap=not terminal, width=None if terminal or "COLUMNS" in os.environ else WIDTH_OF_A_FILE)
