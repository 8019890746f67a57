"""A model of the CUDA kernels' time on an H200: counts per step of the geometry that the launch chooses,
times the constants below. It is within some 15 % of the measured times (benchmarks/NOTES.md).

    python benchmarks/gpu_model.py [--markdown]

A step is a barrier between the blocks (a store, a release, an acquire), the columns of the product read from
the L2 cache, the multiplication, the sums over warps, and the activations. These times add up, because each
part waits for the one before. Loads from global memory overlap with all of them.
"""

import argparse
from dataclasses import dataclass
from typing import NamedTuple

import torch

import fastrnn  # noqa: F401  (registers the operators)
from fastrnn.bench.cases import GATES, Case

# ---- An H200, SXM. Sources: [D] NVIDIA's data sheets of H100 and H200; [W] NVIDIA's Hopper white paper;
# [M] Luo et al., "Dissecting the NVIDIA Hopper Architecture through Microbenchmarking", arXiv 2501.12084;
# [C] chipsandcheese.com, "Nvidia's H100: Funny L2, and Tons of Bandwidth"; [A] assumed;
# [N] measured on an H100 (NOTES.md).
MULTIPROCESSORS, SHARED_BYTES = 132, 227 << 10  # [W]
CLOCK = 1.755e9  # [D] Hz: 989 TFLOP/s of bf16 are 4096 operations a cycle of 132 multiprocessors at 1.83 GHz
HBM = 4.8e12  # [D] bytes/s
L2 = 5.6e12  # [C] bytes/s of all multiprocessors together, read
L2_LATENCY = 0.16e-6  # [M] s, 270 cycles
ISSUED = 64 * CLOCK  # [W] bytes/s that a multiprocessor takes from L2 at most
SHARED_BANDWIDTH = 128 * CLOCK  # [W] bytes/s of a multiprocessor
MMA_LATENCY = 33  # [M] cycles from one mma.sync to the next one that adds to its result
MMA_CYCLES = 1.65  # [M] of a multiprocessor, for one mma.sync of 16 x 8 x 16 (62 % of wgmma's rate)
FMA_LANES = 128  # [W] of a multiprocessor and cycle
FMA_SHARE = 0.7  # [A] of the cycles, beside the loads
MEETING = 1.2e-6  # [N] s from the last release to the last acquire that sees it: two trips to L2 and a store
ALONE = 0.7e-6  # [N] s of a step that has nothing to wait for: addresses and two __syncthreads
STEP_PRODUCT = 5e-6  # [A] s of a launch of torch's product and of a kernel behind it, in a loop of the host's

NUMBERS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64"}


class Geometry(NamedTuple):
    """As torch.ops.fastrnn.cuda_geometry gives it: Shape and Geometry of csrc/cuda/geometry.h."""

    warps: int
    row_tiles: int
    resident: int
    units: int
    blocks: int
    replicas: int
    rows: int
    batch: int
    row_warps: int
    depth_warps: int
    chunks: int
    per_warp: int
    spilled: int
    stride: int
    shared_bytes: int


@dataclass(frozen=True)
class Scan:
    """One layer in one direction of time."""

    cell: str
    numbers: str  # bf16, f16, tf32, f32 or f64
    T: int
    B: int
    H: int
    forward: bool
    directions: int = 1
    projected: bool = False

    def geometry(self, multiprocessors=MULTIPROCESSORS, shared_bytes=SHARED_BYTES) -> Geometry | None:
        numbers = torch.ops.fastrnn.cuda_geometry(
            self.forward, self.numbers, GATES[self.cell], self.T, self.B, self.H, self.directions,
            self.projected, multiprocessors, shared_bytes,
        )  # fmt: skip
        return Geometry(*numbers) if numbers else None

    @property
    def element_bytes(self) -> int:
        return {"bf16": 2, "f16": 2, "f64": 8}.get(self.numbers, 4)


class Counts(NamedTuple):
    """Of one step."""

    mma_warp: float  # mma.sync of a warp, or for f32 rounds of 64 FMAs of each of its lanes
    mma_block: float
    exchange_bytes: int  # read from the exchange by a block
    l2_bytes: int  # the same from L2, by all blocks together; 0 with one block
    shared_bytes: int  # read and written in shared memory by a block
    arrivals: int
    hbm_bytes: int  # of all blocks: gates_x or the saved activations, and the results


def count(scan: Scan, g: Geometry) -> Counts:
    tiles, exact = g.batch // 8, scan.numbers == "f32"
    depth = g.per_warp
    working = g.row_warps * g.depth_warps
    per_chunk = g.row_tiles * (g.rows / 8 if exact else 2 * tiles)
    exchange = g.row_warps * g.chunks * 64 * g.batch
    grid = g.blocks * g.replicas * scan.directions
    rows = g.row_warps * g.row_tiles * 16
    partial = 2 * 4 * g.depth_warps * rows * g.batch  # written and read
    spilled = working * g.spilled * g.row_tiles * 1024 * tiles
    G = GATES[scan.cell]
    saved = {"LSTM": 5, "GRU": 4, "RNN": 0}[scan.cell]  # with c
    states = {"LSTM": 2, "GRU": 1, "RNN": 1}[scan.cell]
    gradients = {"LSTM": 4, "GRU": 4, "RNN": 1}[scan.cell]
    touched = G + 1 + saved if scan.forward else saved + 1 + states + gradients
    return Counts(
        mma_warp=depth * per_chunk,
        mma_block=g.row_warps * g.chunks * per_chunk,
        exchange_bytes=exchange,
        l2_bytes=exchange * grid if g.blocks > 1 else 0,
        shared_bytes=partial + spilled + (exchange if g.blocks == 1 else 0),
        arrivals=g.blocks if g.blocks > 1 else 0,
        hbm_bytes=touched * scan.B * scan.H * scan.element_bytes * scan.directions,
    )


class Prediction(NamedTuple):
    """Microseconds of a step and of its parts."""

    total: float
    meeting: float
    fetch: float
    product: float
    cell: float
    far: float

    @property
    def limit(self) -> str:
        """What takes longest."""
        parts = self._asdict()
        del parts["total"]
        return max(parts, key=parts.__getitem__)


def predict(scan: Scan, g: Geometry) -> Prediction:
    counts = count(scan, g)
    one = g.blocks == 1
    grid = g.blocks * g.replicas * scan.directions
    meeting = ALONE if one else MEETING
    from_l2 = counts.l2_bytes / grid
    fetch = 0 if one else L2_LATENCY + max(counts.l2_bytes / L2, from_l2 / ISSUED)
    tiles = g.batch // 8
    depth = g.per_warp
    if scan.numbers == "f32":
        product = counts.mma_block * 64 * 32 / (FMA_LANES * FMA_SHARE) / CLOCK
    else:
        chain = tiles * 2 * depth * MMA_LATENCY  # a tile of columns begins when the one before has ended
        product = max(chain, counts.mma_block * MMA_CYCLES) / CLOCK
    product += counts.shared_bytes / SHARED_BANDWIDTH
    # [A] of a pair: 10 cycles for each partial sum, 150 for the activations, one warp beside the other.
    rounds = -(-g.rows * g.units // (32 * g.warps))
    partial_sums = (GATES[scan.cell] if scan.forward else 1) * g.depth_warps
    cell = rounds * (10 * partial_sums + 150) / CLOCK
    far = counts.hbm_bytes / HBM
    total = max(meeting + fetch + product + cell, far)
    return Prediction(*(1e6 * part for part in (total, meeting, fetch, product, cell, far)))


def step_microseconds(scan: Scan) -> tuple[float, str]:
    """(microseconds of a step, what limits it)"""
    g = scan.geometry()
    if g is None:
        return 1e6 * 2 * STEP_PRODUCT * scan.directions, "launches"
    prediction = predict(scan, g)
    return prediction.total, prediction.limit


def case_microseconds(case: Case, numbers: str, training: bool) -> float:
    """A step through all layers of the case: the scans alone, without the products around them."""
    D = 2 if case.bidirectional else 1
    ways = (True, False) if training else (True,)
    scans = [Scan(case.cell, numbers, case.T, case.B, case.H, way, D, case.proj_size > 0) for way in ways]
    return case.layers * sum(step_microseconds(scan)[0] for scan in scans)


# (cell, numbers, T, B, H, directions): the anchors, and the cases with targets.
ANCHORS = [
    *(("LSTM", "f16", 1024, B, 768, 1) for B in (1, 2, 8, 16, 32, 64, 128)),
    *(("LSTM", "bf16", 256, B, H, 1) for B in (16, 64) for H in (256, 512, 1024)),
    *(("LSTM", numbers, 100, 64, 512, 1) for numbers in ("tf32", "f32")),
    *(("LSTM", "f32", 8000, 16, H, 1) for H in (128, 129, 192, 193, 256)),
    ("GRU", "bf16", 1500, 32, 1024, 1),
    ("GRU", "f32", 1500, 32, 1024, 1),
    ("GRU", "bf16", 187, 32, 1536, 1),
    ("LSTM", "bf16", 50, 64, 256, 2),
    ("LSTM", "bf16", 25, 32, 2048, 1),
    ("RNN", "bf16", 50, 64, 1760, 1),
    ("LSTM", "bf16", 100, 32, 128, 1),
]  # fmt: skip


def rows() -> list[list[str]]:
    found = []
    for cell, numbers, T, B, H, D in ANCHORS:
        for forward in (True, False):
            scan = Scan(cell, numbers, T, B, H, forward, D)
            g = scan.geometry()
            name = [f"{cell} {T}x{B}x{H}{' bi' if D == 2 else ''}", numbers, "fwd" if forward else "bwd"]
            if g is None:
                time, limit = step_microseconds(scan)
                found.append([*name, "each step", *[""] * 9, f"{time:.1f}", limit])
                continue
            c, p = count(scan, g), predict(scan, g)
            found.append([
                *name, f"{g.blocks} x {g.replicas} x {g.units}u {g.batch}r", f"{c.mma_warp:g}",
                f"{c.mma_block:g}", f"{c.exchange_bytes / 1024:.0f}", f"{c.l2_bytes / 1e6:.1f}",
                f"{c.shared_bytes / 1024:.0f}", f"{c.hbm_bytes / 1e6:.2f}",
                *(f"{part:.2f}" for part in (p.fetch, p.product, p.cell)), f"{p.total:.1f}", p.limit,
            ])  # fmt: skip
    return found


COLUMNS = [
    "scan", "numbers", "way", "blocks x replicas, units, rows", "mma a warp", "a block", "KiB exchanged",
    "MB from L2", "KiB shared", "MB far", "fetch us", "product", "cell", "us a step", "limit",
]  # fmt: skip


def short_rows() -> list[list[str]]:
    """A scan a row, both ways."""

    def way(scan: Scan) -> list[str]:
        g = scan.geometry()
        layout = f"{g.blocks} x {g.replicas}" if g else "each step"
        time, limit = step_microseconds(scan)
        return [layout, f"{time:.1f}", limit]

    found = []
    for cell, numbers, T, B, H, D in ANCHORS:
        ways = (way(Scan(cell, numbers, T, B, H, forward, D)) for forward in (True, False))
        found.append([f"{cell} {T}x{B}x{H}{' bi' if D == 2 else ''}", numbers, *next(ways), *next(ways)])
    return found


SHORT_COLUMNS = ["scan", "numbers", "forward: blocks x replicas", "us", "limit", "backward", "us", "limit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="a shorter table")
    if parser.parse_args().markdown:
        for row in (SHORT_COLUMNS, ["---"] * len(SHORT_COLUMNS), *short_rows()):
            print(f"| {' | '.join(row)} |")
        return
    from rich.console import Console

    from fastrnn.bench.tables import make_table

    table = make_table("Predicted: one step of a scan on an H200", *COLUMNS)
    for row in rows():
        table.add_row(*row)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
