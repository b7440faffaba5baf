"""What a job runs on the cluster: `python -m treelora_platform.submit.entry ARGUMENTS OF TREELORA`, or `probe`.

Ray's supervisor of the job starts its driver with SIGINT blocked and stops it with SIGTERM. Here SIGTERM becomes
Ctrl-C from the first moment on, so that whatever the command is at, it closes its run and ends with 130.
"""

from __future__ import annotations

import signal
import sys


def obey_signals() -> None:
    """Let SIGINT through, and SIGTERM do the same."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def main(arguments: list[str]) -> None:
    """Run the probe, or the command."""
    obey_signals()
    try:
        if arguments == ["probe"]:
            from treelora_platform.submit.probe import main as probe

            probe()
            return
        from treelora_platform.cli import app

        app(arguments)
    except KeyboardInterrupt:  # before the command could take care of it
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
