"""One case measured: checked against float64 first, then timed, then its memory."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench.cases import INFER, TRAIN, Case
from fastrnn.bench.measure import paired
from fastrnn.bench.memory import peak_megabytes
from fastrnn.bench.peak import Peak
from fastrnn.bench.results import RIVAL, SUBJECT, Record
from fastrnn.bench.workload import Workload, agree, check, reference_results

# A peer is a module with supports(case) and make_call(workload, threads); it serves inference.
PEERS = {"onnxruntime": "fastrnn.bench.onnx_peer", "openvino": "fastrnn.bench.openvino_peer"}

ROUNDED = 0.1  # the most that rounded weights may be off: they are by 0.01 to 0.03, wrong products by 1
reference = lru_cache(maxsize=2)(reference_results)


def measure_case(
    case: Case,
    mode: str,
    threads: int,
    peak: Peak,
    seconds: float,
    peers: Sequence[str] = (),
    memory: bool = False,
    prepack: bool | str = False,
    others_cpu: Callable[[], float] | None = None,
) -> Record:
    """Raises workload.Disagreement, before any timing, where a contender's results are wrong."""
    torch.set_num_threads(threads)
    expected = reference(case, mode)
    subject = Workload(case, fastrnn, mode)
    rival = Workload(case.plain, fastrnn if case.options else nn, mode)
    rounds = mode == INFER and isinstance(prepack, str)
    if rounds:
        fastrnn.prepack(subject.module, getattr(torch, str(prepack)))
    elif prepack and mode == INFER:
        fastrnn.prepack(subject.module)
    check(rival, reference(case.plain, mode) if case.options else expected)
    check(subject, expected, ROUNDED if rounds else 0)
    contenders: dict[str, Callable[[], object]] = {RIVAL: rival, SUBJECT: subject}
    if case.dtype == torch.bfloat16:
        contenders["fastrnn float32"] = Workload(case, fastrnn, mode, torch.float32)
    if mode == INFER:
        contenders |= {name: call for name in peers if (call := _peer(name, rival, threads, expected))}
    timing = paired(contenders, SUBJECT, seconds, others_cpu)
    # A short call's is below the noise of 1 MB.
    memory = memory and mode == TRAIN and case.group not in ("short", "options")
    gflops = case.flops(mode) / timing.seconds[SUBJECT] / 1e9
    attainable = peak.gflops / (2 if case.dtype == torch.float64 else 1)
    return Record(
        case=case.name,
        group=case.class_of(mode),
        mode=mode,
        threads=threads,
        ms={name: 1e3 * value for name, value in timing.seconds.items()},
        ratios=timing.ratios,
        gflops=gflops,
        peak_share=gflops / attainable,
        rounds=timing.rounds,
        discarded=timing.discarded,
        disturbed=timing.disturbed,
        megabytes=_memory(case, threads) if memory else {},
    )


def _peer(name: str, rival: Workload, threads: int, expected: list[Tensor]) -> Callable[[], object] | None:
    """The peer's call, checked; None where it has no such network."""
    peer = import_module(PEERS[name])
    if not peer.supports(rival.case):
        return None
    call = peer.make_call(rival, threads)
    agree(f"{name} on {rival.case.name}", [torch.from_numpy(array) for array in call()], expected)
    return call


def _memory(case: Case, threads: int) -> dict[str, float]:
    libraries = {RIVAL: "torch.nn", SUBJECT: "fastrnn"}
    return {name: peak_megabytes(case, library, threads) for name, library in libraries.items()}
