"""Children of the rig: each has a log file, and none outlives the rig.

Only processes started here are ever signalled, by the pid we hold.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TERMINATE_GRACE_S = 20.0
"""How long a child may take to end after SIGTERM: windlass drains for up to ten seconds."""


class Process:
    """One long-running child whose output goes to `log`; without `env` it gets ours."""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.argv = list(argv)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # A session of its own: Ctrl-C reaches the rig, and the rig ends its children in order.
            self._child = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def running(self) -> bool:
        return self._child.poll() is None

    def wait(self, timeout_s: float) -> int:
        return self._child.wait(timeout_s)

    def ask_to_end(self) -> None:
        """SIGTERM, and nothing more."""
        self._child.send_signal(signal.SIGTERM)

    def terminate(self) -> int:
        """SIGTERM, then SIGKILL when the grace is over. Returns the exit status."""
        if self.running():
            self._child.send_signal(signal.SIGTERM)
            try:
                return self._child.wait(TERMINATE_GRACE_S)
            except subprocess.TimeoutExpired:
                pass
        return self.kill()

    def kill(self) -> int:
        """SIGKILL, as a crash would."""
        if self.running():
            self._child.kill()
        return self._child.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def peak_resident_bytes(self) -> int:
        """The high-water mark of resident memory (VmHWM)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"no VmHWM in /proc/{self.pid}/status")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float, process: Process | None = None) -> None:
    """Polls `condition`; fails at once when `process` has ended, naming the end of its log."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process is not None and not process.running():
            raise RuntimeError(f"waiting until {what}: {process.argv[0]} ended\n{process.output()[-4000:]}")
        if time.monotonic() > deadline:
            tail = f"\n{process.output()[-4000:]}" if process is not None else ""
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}{tail}")
        time.sleep(0.05)


def run(argv: Sequence[str], timeout_s: float = 120.0, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Runs a short command; a failure shows what it wrote."""
    done = subprocess.run(list(argv), capture_output=True, timeout=timeout_s, check=False, **options)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{done.stdout!r}\n{done.stderr!r}")
    return done
