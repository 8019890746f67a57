"""fastrnn beside cuDNN, that is torch.nn on a CUDA device: forward alone and forward and backward.

    python benchmarks/gpu.py OUT [--budget SECONDS] [--cases GLOB ...]

prints tables, and writes OUT/gpu.json and OUT/gpu.png. With --device cpu --quick it is a smoke test.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path

import gpu_model
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastrnn
from fastrnn.bench.cases import CASES, TRAIN, Case
from fastrnn.bench.measure import paired
from fastrnn.bench.plots import plot_ratios
from fastrnn.bench.results import RIVAL, SUBJECT, Record, Results, describe_environment, geometric_mean
from fastrnn.bench.tables import make_table, ratio_text
from fastrnn.bench.workload import Workload

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f32": torch.float32}
# Limits of ||a - float64|| / ||float64|| for each result; up to three times torch.nn's own error passes too.
TOLERANCE = {"bf16": 6e-2, "f16": 1e-2, "tf32": 1e-2, "f32": 1e-4}
# Dense operations a second in an H200's data sheet, for the roofline.
PEAK = {"bf16": 989e12, "f16": 989e12, "tf32": 494e12, "f32": 67e12}

Job = tuple[Case, str, str]  # the case, its numbers, its mode


def _cases(*shapes: tuple, numbers: tuple[str, ...], cell: str = "LSTM", **options) -> list[tuple[Case, str]]:
    """Of (T, B, H) or (T, B, I, H)."""
    made = [Case(cell, T, B, width[0], width[-1], **options) for T, B, *width in shapes]
    return [(replace(case, dtype=DTYPES[n]), n) for case in made for n in numbers]


# Cases with targets come first, because a budget that runs out drops the last ones.
ON_A_DEVICE = [
    *_cases(*((256, B, H) for B in (16, 64) for H in (256, 512, 1024)), numbers=("bf16",)),
    *_cases(*((1024, B, 768) for B in (1, 2, 8, 16, 32, 64, 128)), numbers=("f16", "bf16")),
    *_cases((100, 64, 512), numbers=("tf32", "f32")),
    # The cliff is at T = 8000; its cost of a step is the same at an eighth of that.
    *_cases(*((1000, 16, 9, H) for H in (128, 129, 192, 193, 256)), numbers=("tf32", "f32"), layers=4),
    *_cases((1500, 32, 1024), numbers=("bf16", "tf32"), cell="GRU"),
]
QUICK = [*_cases((5, 3, 4, 8), numbers=("f32",)), *_cases((5, 3, 4, 8), numbers=("f32",), cell="GRU")]


def jobs(quick: bool, globs: list[str]) -> list[Job]:
    known = [
        (replace(case, dropout=0.0, dtype=DTYPES[numbers]), numbers)
        for numbers in ("bf16", "tf32", "f32")  # f16 is as fast as bf16
        for case in CASES
        if case.group in ("dense", "stack", "packed") and case.dtype is torch.float32
    ]
    chosen = QUICK if quick else dict.fromkeys([*ON_A_DEVICE, *known])
    return [
        (case, numbers, mode)
        for case, numbers in chosen
        for mode in case.modes
        if any(fnmatch(f"{case.name}-{numbers}", glob) for glob in globs)
    ]


@dataclass(frozen=True)
class DeviceRecord(Record):
    """``ms`` of a whole call; ``threads`` is 0."""

    numbers: str = ""
    us_step: float = 0.0  # of fastrnn, through all layers
    torch_us_step: float = 0.0
    model_us_step: float = 0.0  # what gpu_model predicts of the scans alone, on an H200
    cudnn: str = ""  # the regime that torch chooses
    path: str = ""  # that fastrnn took, in explain's words


def cudnn_regime(case: Case, numbers: str, forward: bool) -> str:
    """The algorithm that torch asks of cuDNN on a device with 98 multiprocessors and more (get_algo in
    aten/src/ATen/native/cudnn/RNN.cpp)."""
    if case.proj_size or case.fill < 1:
        return "GEMM per step"
    plain = case.cell == "RNN"
    small = (384 if forward else 256) if plain else (192 if forward else 128)
    if small >= case.H:
        return "persistent, small H"
    aligned = case.H <= 1024 and case.H % 128 == 0 and case.I % 128 == 0
    single = case.layers == 1 and not case.bidirectional
    rows = case.B % 8 == 0 and case.B <= 128 and not (plain and case.B >= 96 and case.H >= 896)
    if numbers == "f16" and aligned and single and rows and case.cell != "GRU":
        return "persist-static"
    return "GEMM per step"


def device_turn(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call between two CUDA events, averaged over a turn."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    pairs = ((a.detach().double(), b.detach()) for a, b in pairs)
    return [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs]


def check(case: Case, numbers: str, device: str, rival: Workload, subject: Workload) -> str | None:
    """The first result of fastrnn that is off, in words, or None."""
    exact = Workload(replace(case, dtype=DTYPES[numbers]), nn, subject.mode, torch.float64, device)()
    ours, theirs = errors(subject(), exact), errors(rival(), exact)
    for i, (error, other) in enumerate(zip(ours, theirs, strict=True)):
        if not error <= max(TOLERANCE[numbers], 3 * other):
            return f"result {i} is off by {error:.1e} (torch.nn {other:.1e})"
    return None


def roofline_seconds(case: Case, numbers: str, mode: str) -> float:
    """The larger of operations / peak rate and bytes / memory bandwidth, each byte counted once."""
    rows, D = int(case.lengths().sum()), 2 if case.bidirectional else 1
    R = case.proj_size or case.H
    weights = sum(p.numel() for p in nn_module(case).parameters())
    touched = weights + rows * (case.I + case.layers * D * R)
    touched *= 2 if mode == TRAIN else 1
    far = touched * DTYPES[numbers].itemsize / gpu_model.HBM
    return max(case.flops(mode) / PEAK[numbers], far)


def nn_module(case: Case) -> nn.Module:
    with torch.device("meta"):
        return getattr(nn, case.cell)(case.I, case.H, case.layers, bidirectional=case.bidirectional)


def set_precision(numbers: str) -> None:
    """tf32 for both, the recurrence and the products around it, or for neither."""
    precision = "tf32" if numbers == "tf32" else "ieee"
    torch.backends.cudnn.rnn.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = precision


def path_of(subject: Workload) -> str:
    assert isinstance(subject.x, (Tensor, PackedSequence))
    states = subject.states if len(subject.states) == 2 else subject.states[0]
    first = fastrnn.explain(subject.module, subject.x, states)[0]
    if first.operator is None:
        return f"torch.nn's own path: {first.forward}"
    return f"{first.forward} / {first.backward}" if subject.mode == TRAIN else first.forward


def measure(job: Job, device: str, seconds: float) -> DeviceRecord | str:
    """A record, or what is wrong with the results."""
    case, numbers, mode = job
    set_precision(numbers)
    rival, subject = (Workload(case, library, mode, device=device) for library in (nn, fastrnn))
    if wrong := check(case, numbers, device, rival, subject):
        return wrong
    turn = device_turn if device == "cuda" else None
    timing = paired({RIVAL: rival, SUBJECT: subject}, SUBJECT, seconds, lambda: 0.0, turn)
    mine = timing.seconds[SUBJECT]
    us = {name: 1e6 * value / case.T for name, value in timing.seconds.items()}
    regimes = [cudnn_regime(case, numbers, forward) for forward in (True, False)[: 1 + (mode == TRAIN)]]
    return DeviceRecord(
        case=f"{case.name}-{numbers}",
        group=f"{case.cell} {numbers} {'training' if mode == TRAIN else 'inference'}",
        mode=mode,
        threads=0,
        ms={name: 1e3 * value for name, value in timing.seconds.items()},
        ratios=timing.ratios,
        gflops=case.flops(mode) / mine / 1e9,
        peak_share=roofline_seconds(case, numbers, mode) / mine,
        rounds=timing.rounds,
        discarded=timing.discarded,
        disturbed=timing.disturbed,
        numbers=numbers,
        us_step=us[SUBJECT],
        torch_us_step=us[RIVAL],
        model_us_step=gpu_model.case_microseconds(case, numbers, mode == TRAIN),
        cudnn=" / ".join(dict.fromkeys(regimes)),
        path=path_of(subject),
    )


def show(console: Console, records: list[DeviceRecord]) -> None:
    for group, members in groupby(sorted(records, key=lambda r: r.group), key=lambda r: r.group):
        columns = ("torch us/step", "fastrnn", "model", "torch/fastrnn", "roofline", "cuDNN", "path")
        table = make_table(group, "case", *columns)
        for r in members:
            times = (r.torch_us_step, r.us_step, r.model_us_step)
            colour = "red" if r.ratios[RIVAL].median < 0.95 else ""
            table.add_row(
                r.case, *(f"{time:.2f}" for time in times), ratio_text(r, RIVAL), f"{r.peak_share:.1%}",
                r.cudnn, short(r.path), style=colour,
            )  # fmt: skip
        console.print(table)
    table = make_table(
        "Classes: time of torch.nn / time of fastrnn", "class", "shapes", "mean", "worst", "case"
    )
    for group, found in groupby(sorted(records, key=lambda r: r.group), key=lambda r: r.group):
        members = sorted(found, key=lambda r: r.ratios[RIVAL].median)
        ratios = [r.ratios[RIVAL].median for r in members]
        mean, worst = (f"{value:.2f}" for value in (geometric_mean(ratios), ratios[0]))
        table.add_row(group, str(len(members)), mean, worst, members[0].case)
    console.print(table)


def short(path: str) -> str:
    """The paths forward and backward, without the details in explain's words."""
    ways = (way.split(";")[0].split(", which")[0] for way in path.split(" / "))
    return " / ".join(way.removeprefix("persistent, ")[:40] for way in ways)


def describe_device(device: str) -> dict[str, object]:
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget", type=float, default=270, metavar="SECONDS", help="for everything")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--quick", action="store_true", help="two small cases")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick is a smoke test")
    chosen = jobs(options.quick, options.cases)
    end = time.monotonic() + options.budget
    records: list[DeviceRecord] = []
    failures, left_out = [], []
    progress = Console(stderr=True)
    for i, job in enumerate(chosen):
        name = f"{job[0].name}-{job[1]} {job[2]}"
        left = end - time.monotonic()
        if left <= 0:
            left_out.append(name)
            continue
        try:
            # Half of the time goes into preparation and the check.
            found = measure(job, options.device, 0.5 * left / (len(chosen) - i))
        except RuntimeError as error:  # of one case; the others are still worth having
            found = str(error)
        if isinstance(found, str):
            failures.append(f"{name}: {found}")
            progress.print(f"FAILED {failures[-1]}")
        else:
            records.append(found)
            progress.print(f"{name}: {ratio_text(found, RIVAL)}")
    environment = describe_environment({}) | describe_device(options.device)
    environment |= {"left out": left_out, "failed": failures}
    results = Results(environment, records)  # type: ignore[arg-type]
    results.save(options.out / "gpu.json")
    console = Console(width=200)
    console.print({key: value for key, value in environment.items() if key != "left out"})
    show(console, records)
    console.print(f"left out for want of time: {len(left_out)} of {len(chosen)}")
    for failure in failures:
        console.print(f"FAILED {failure}", style="bold red", highlight=False)
    if records:
        plot_ratios(results, options.out / "gpu.png")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
