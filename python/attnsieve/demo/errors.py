"""The one exception that a command prints as a line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


class DemoError(Exception):
    """Something the user can put right; the message is one line that says what."""


def run_command(name: str, run: Callable[[argparse.Namespace], None], options) -> int:
    """0, or 2 after one line on stderr when the user must act."""
    try:
        run(options)
    except DemoError as error:
        print(f"attnsieve {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"attnsieve {name}: interrupted", file=sys.stderr)
        return 130
    return 0
