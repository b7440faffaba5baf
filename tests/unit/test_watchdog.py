"""A worker without progress ends itself and says where it was; one with progress doesn't."""

import subprocess
import sys
import textwrap

from treelora_platform.watchdog import EXIT_CODE, stalls


def worker(tmp_path, body):
    script = f"""
        import os, signal, sys, threading, time
        from pathlib import Path
        from treelora_platform.watchdog import Watchdog
        dog = Watchdog(Path({str(tmp_path)!r}), "rank-3", 1.0)
        dog.watch()
    """
    code = textwrap.dedent(script) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode


def test_no_progress_ends_it_with_its_stacks(tmp_path):
    code = worker(
        tmp_path,
        """
        def a_collective_that_never_returns():
            time.sleep(60)
        dog.feed("task a: step 7")
        a_collective_that_never_returns()
        """,
    )
    assert code == EXIT_CODE
    (said,) = stalls(tmp_path)
    path = tmp_path / "stalls" / "rank-3.txt"
    assert said == f"rank 3: no progress for 1 s after task a: step 7 (stacks: {path})"
    assert "a_collective_that_never_returns" in path.read_text()


def test_progress_and_the_end_of_the_watch_keep_it_alive(tmp_path):
    body = """
        for step in range(15):
            time.sleep(0.2)
            dog.feed(f"step {step}")
        dog.stop()
        time.sleep(2)
        sys.exit(4)
    """
    assert worker(tmp_path, body) == 4
    assert stalls(tmp_path) == []


def test_the_time_that_it_was_frozen_itself_does_not_count(tmp_path):
    body = """
        pid = os.getpid()
        if os.fork() == 0:
            time.sleep(0.3)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(3)
            os.kill(pid, signal.SIGCONT)
            os._exit(0)
        for step in range(10):
            time.sleep(0.2)
            dog.feed(f"step {step}")
        dog.stop()
        sys.exit(5)
    """
    assert worker(tmp_path, body) == 5
