"""What a run found: one record per case, mode and thread count, the machine it ran on, and JSON."""

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path

import torch

from fastrnn.bench.measure import Quartiles
from fastrnn.bench.peak import Peak

SUBJECT, RIVAL = "fastrnn", "torch"
FORMAT = 1

# Variables that limit a library's instruction set or threads: figures under one of them are quoted with it.
VARIABLES = (
    "ATEN_CPU_CAPABILITY", "FASTRNN_CPU_ISA", "KMP_AFFINITY", "MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "ONEDNN_MAX_CPU_ISA",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """``ms`` of one call by contender; ``ratios`` of every other's time to fastrnn's."""

    case: str
    group: str  # the row of the table of classes
    mode: str
    threads: int
    ms: dict[str, float]
    ratios: dict[str, Quartiles]
    gflops: float  # of fastrnn
    peak_share: float
    rounds: int
    discarded: int
    disturbed: bool
    megabytes: dict[str, float] = field(default_factory=dict)  # of a training step, by contender

    @property
    def key(self) -> tuple[str, str, int]:
        return self.case, self.mode, self.threads


@dataclass(frozen=True)
class Results:
    environment: dict[str, object]
    records: list[Record]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> "Results":
        """Raises ValueError where ``path`` is not a file of results."""
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format must be {FORMAT}, got {content['format']}")
            records = [_record(entry) for entry in content["records"]]
            return Results(content["environment"], records)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of benchmark results: {error!r}") from error


def _record(entry: dict) -> Record:
    """A record from its JSON, without the fields that only benchmarks/gpu.py has."""
    known = {f.name: entry[f.name] for f in fields(Record) if f.name in entry}
    ratios = {name: Quartiles(**quartiles) for name, quartiles in entry["ratios"].items()}
    return Record(**{**known, "ratios": ratios})


def describe_environment(peaks: dict[int, Peak]) -> dict[str, object]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": torch.ops.fastrnn.cpu_isa(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "peaks": {str(threads): asdict(peak) for threads, peak in peaks.items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }


def cpu_model() -> str:
    """The processor's name and, as virtual machines shorten names, family and model number."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text().splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']}, family {fields['cpu family']} model {fields['model']}"


def geometric_mean(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).log().mean().exp())
