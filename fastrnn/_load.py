"""How much of this machine others use: other processes, and the host of a virtual machine."""

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
# Of a line "cpu0 ...": user, nice, system, irq, softirq; what the host takes.
BUSY, STEAL = (1, 2, 3, 6, 7), 8


class Load:
    """Counts from its creation on, on the cores that this process may use; zero without /proc/stat."""

    def __init__(self) -> None:
        self.begun = self._seconds()

    def _seconds(self) -> tuple[float, float, float]:
        """The time, and CPU seconds since boot of other processes and of the host."""
        cores = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
        lines = STAT.read_text().splitlines() if STAT.exists() else []
        rows = [fields for fields in map(str.split, lines) if fields and fields[0] in cores]
        ticks = os.sysconf("SC_CLK_TCK")
        busy = sum(int(fields[k]) for fields in rows for k in BUSY) / ticks
        own = sum(os.times()[:4])  # with its children
        return time.monotonic(), busy - own, sum(int(fields[STEAL]) for fields in rows) / ticks

    def others(self) -> tuple[float, float]:
        """Cores that other processes have used, and cores that the host has not given."""
        elapsed, busy, steal = (now - then for now, then in zip(self._seconds(), self.begun, strict=True))
        return max(busy, 0.0) / max(elapsed, 1e-3), steal / max(elapsed, 1e-3)

    def against(self, threads: int) -> str:
        """Who uses the cores that this many threads of this process want; empty where they have them."""
        cores, (others, host) = len(os.sched_getaffinity(0)), self.others()
        if others + host + threads <= cores + 0.5:
            return ""
        taken = f", the host of this virtual machine {host:.1f}" if host >= 0.1 else ""
        return f"other processes use {others:.1f} of {cores} cores{taken}"


def let_threads_sleep() -> None:
    """On a busy machine, OpenMP's threads are to sleep while they wait, unless the user has chosen.

    Threads that spin keep others from the cores, also those they wait for: beside two busy processes on two
    cores a training step took 0.46 s, and more than 5 s with spinning. On a quiet machine it would cost 11 %.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    load = Load()
    time.sleep(0.1)
    if load.against(len(os.sched_getaffinity(0))):
        os.environ["OMP_WAIT_POLICY"] = "passive"
