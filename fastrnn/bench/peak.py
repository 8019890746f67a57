"""The machine's peak rate of fused multiply-adds at a thread count, of which the tables give shares.

Nothing in torch runs at that rate (a product of 1024 x 1024 matrices reaches 75-90 % of it), so a
loop of independent multiply-adds is written as x86-64 machine code. Where that cannot run, the
best product of matrices stands in, and the name of the source says so.
"""

import ctypes
import mmap
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread

import torch

CHAINS = 14  # independent accumulators, registers 0..13: latency 4-5 x 2 issued per cycle, and spare
ROUNDS = 2_000_000  # of the loop, 5-15 ms: long enough that starting the threads does not count
TRIES = 10


@dataclass(frozen=True)
class Peak:
    gflops: float  # float32; float64 has half as many lanes and half the peak
    source: str


def measure_peak(threads: int) -> Peak:
    """The best rate that was seen on ``threads`` threads."""
    peaks = [Peak(_matmul_gflops(), "torch.mm")]
    if platform.machine() == "x86_64" and platform.system() == "Linux":
        capability = torch.backends.cpu.get_cpu_capability()
        if capability in ("AVX2", "AVX512"):
            peaks.append(Peak(_loop_gflops(_avx2_loop(), 8, threads), "AVX2 FMA loop"))
        if capability == "AVX512":
            peaks.append(Peak(_loop_gflops(_avx512_loop(), 16, threads), "AVX-512 FMA loop"))
    return max(peaks, key=lambda peak: peak.gflops)


def _matmul_gflops() -> float:
    def seconds(n: int) -> float:
        a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        return time.perf_counter() - start

    return max(2 * n**3 / seconds(n) / 1e9 for n in (512, 1024) for _ in range(TRIES))


def _loop_gflops(code: bytes, lanes: int, threads: int) -> float:
    """``code`` is a C function ``void f(int64_t rounds)``; ctypes lets go of the GIL in it."""
    with mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        address = ctypes.c_char.from_buffer(page)
        loop = ctypes.CFUNCTYPE(None, ctypes.c_int64)(ctypes.addressof(address))
        rate = max(_rate_together(loop, threads) for _ in range(TRIES))
        del loop, address  # a mapping that is still pointed into cannot be closed
    return 2 * lanes * CHAINS * rate / 1e9


def _rate_together(loop: Callable[[int], None], threads: int) -> float:
    """Rounds per second of all threads at once, by each one's CPU time: waiting does not count."""
    rates: list[float] = []

    def work() -> None:
        start = time.thread_time()
        loop(ROUNDS)
        rates.append(ROUNDS / (time.thread_time() - start))

    workers = [Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def _avx2_loop() -> bytes:
    """vfmadd231ps ymm<k>, ymm14, ymm15 (VEX.256.66.0F38.W0 B8) for every chain k."""
    return _loop(
        b"".join(bytes([0xC4, (k < 8) << 7 | 0x42, 0x0D, 0xB8, 0xC7 | (k & 7) << 3]) for k in range(CHAINS))
    )


def _avx512_loop() -> bytes:
    """vfmadd231ps zmm<k>, zmm14, zmm15 (EVEX.512.66.0F38.W0 B8) for every chain k."""
    return _loop(
        b"".join(
            bytes([0x62, (k < 8) << 7 | 0x52, 0x0D, 0x48, 0xB8, 0xC7 | (k & 7) << 3]) for k in range(CHAINS)
        )
    )


def _loop(body: bytes) -> bytes:
    """vzeroall; do { body } while (--rdi); vzeroupper; ret."""
    count = b"\x48\x83\xef\x01"  # sub rdi, 1
    back = -(len(body) + len(count) + 6)  # from the end of jnz rel32
    jump = b"\x0f\x85" + back.to_bytes(4, "little", signed=True)
    return b"\xc5\xfc\x77" + body + count + jump + b"\xc5\xf8\x77\xc3"
