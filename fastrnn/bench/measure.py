"""Paired timing: in every round each contender has one turn, so that a slow moment hits them all.

The order reverses from round to round, and a round during which other processes used the CPU
is thrown away. The result is the ratio within each round, as median and quartiles.
"""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median, quantiles

MIN_ROUNDS = 5
MIN_TURN = 0.02  # seconds; a shorter call is repeated within its turn, beyond timer and cache noise
PAUSE = 0.002  # seconds before a turn, in which the other's worker threads stop spinning
# A round is quiet while other processes use at most 5 % of its length, or two ticks of /proc/stat.
OTHERS_SHARE, OTHERS_SECONDS = 0.05, 0.02
PATIENCE = 3  # times the asked rounds and seconds, after which disturbed rounds are taken too

STAT = Path("/proc/stat")
BUSY_FIELDS = (1, 2, 3, 6, 7, 8)  # user, nice, system, irq, softirq, steal
TICKS_PER_SECOND = 100


@dataclass(frozen=True)
class Quartiles:
    low: float
    median: float
    high: float

    @staticmethod
    def of(values: list[float]) -> "Quartiles":
        return Quartiles(*quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Timing:
    """``seconds`` of one call by contender; ``ratios`` of every other's time to the subject's."""

    seconds: dict[str, float]
    ratios: dict[str, Quartiles]
    rounds: int
    discarded: int
    disturbed: bool  # True: too few quiet rounds, so that disturbed ones were taken


def paired(
    contenders: Mapping[str, Callable[[], object]],
    subject: str,
    seconds: float,
    others_cpu: Callable[[], float] | None = None,
    turn: Callable[[Callable[[], object], int], float] | None = None,
) -> Timing:
    """Time the contenders in alternating rounds for about ``seconds``, at least MIN_ROUNDS rounds.

    ``others_cpu`` reads the CPU seconds that all other processes have used so far; ``turn(call, repeats)``
    takes the time of a call where it is not this processor's.
    """
    read_others, turn = others_cpu or cpu_seconds_of_others, turn or _turn
    repeats = {name: _repeats(call, turn) for name, call in contenders.items()}
    quiet: list[dict[str, float]] = []
    noisy: list[dict[str, float]] = []
    order = list(contenders)
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while True:
            spent, tried = time.perf_counter() - start, len(quiet) + len(noisy)
            if len(quiet) >= MIN_ROUNDS and spent >= seconds:
                break
            if tried >= PATIENCE * MIN_ROUNDS and spent >= PATIENCE * seconds:
                break
            others, begin = read_others(), time.perf_counter()
            turns = {name: turn(contenders[name], repeats[name]) for name in order}
            limit = max(OTHERS_SECONDS, OTHERS_SHARE * (time.perf_counter() - begin))
            (noisy if read_others() - others > limit else quiet).append(turns)
            order.reverse()
    finally:
        gc.enable()
    disturbed = len(quiet) < MIN_ROUNDS
    rounds = quiet + noisy if disturbed else quiet
    return Timing(
        seconds={name: median(turns[name] for turns in rounds) for name in contenders},
        ratios={
            name: Quartiles.of([turns[name] / turns[subject] for turns in rounds])
            for name in contenders
            if name != subject
        },
        rounds=len(rounds),
        discarded=0 if disturbed else len(noisy),
        disturbed=disturbed,
    )


def cpu_seconds_of_others() -> float:
    """CPU seconds of everything but this process since boot; 0 where the system does not tell."""
    if not STAT.exists():
        return 0.0
    fields = STAT.read_text().split("\n", 1)[0].split()
    busy = sum(int(fields[k]) for k in BUSY_FIELDS) / TICKS_PER_SECOND
    return busy - time.process_time()


def _turn(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, averaged over a turn."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats(call: Callable[[], object], turn: Callable[[Callable[[], object], int], float]) -> int:
    """How many calls fill a turn; the first call, which allocates and loads, does not count."""
    call()
    return ceil(MIN_TURN / max(turn(call, 1), 1e-7))
