"""The command line: thin commands; whatever is heavy is imported inside their bodies. Rich lives only here."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; errors become a few lines on standard error and an exit code."""
    try:
        from diffkit.cli.output import finish, protect
        from diffkit.cli.signals import interrupting

        protect()
        signals = interrupting()
    except KeyboardInterrupt:
        sys.exit(130)
    code = 1
    try:
        from diffkit.cli.launch import watch_launcher
        from diffkit.engine.processors import set_up_openmp

        set_up_openmp()
        watch_launcher()
        from diffkit.cli.commands import run

        run(sys.argv[1:])
        code = 0
    except BaseException as error:
        signals.finish(130)
        from diffkit.cli.failure import explained

        code = explained(error, interrupted=signals.came)
    finally:
        signals.finish(code)
    finish()
    from diffkit.cli.launch import leave

    leave(code)
    sys.exit(code)
