"""A few small scans on a CUDA device against the reference in float64, without pytest: for compute-sanitizer,
under which everything is slow, and for machines without the test's tools.

    python tests/cuda_small.py [--few]
"""

import argparse
import os
import sys

import torch
from scans import CELL_NAMES, FORMS, make_scan

import fastrnn  # noqa: F401  (registers the operators)
from fastrnn import _cuda
from fastrnn.reference import CELLS

# FASTRNN_TEST_DEVICE=cpu tries this script on the CPU's kernels.
DEVICE = os.environ.get("FASTRNN_TEST_DEVICE", "cuda")
LIMITS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
PLACES = 132, 227 << 10  # an H200's, where there is no device

# (T, B, H, D, form, dtype): in one block, in blocks that meet, with steps of their own.
FEW = [
    (3, 5, 33, 2, "lengths_batch_first", torch.float32),
    (3, 9, 200, 1, "time_major", torch.bfloat16),
    (2, 3, 17, 1, "packed", torch.float64),
]
MORE = [
    (4, 11, 200, 2, form, dtype) for form in FORMS for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


def worst_error(cell: str, T: int, B: int, H: int, D: int, form: str, dtype: torch.dtype) -> float:
    """The largest ||found - exact|| / ||exact|| of the results of forward and backward."""
    exact = make_scan(cell, T, B, H, D=D, **FORMS[form]).map(lambda t: t.to(dtype).double())
    stored = exact.to(DEVICE, dtype)
    expected = exact.reference()
    found = stored.kernel()
    outputs = tuple(t.to(dtype) for t in expected)
    gradients = tuple(None if t is None else t.to(dtype) for t in exact.gradients(expected))
    there = [tuple(None if t is None else t.to(DEVICE) for t in given) for given in (outputs, gradients)]
    back = [tuple(None if t is None else t.double() for t in given) for given in (outputs, gradients)]
    expected += exact.reference_backward(*back)
    found += stored.kernel_backward(*there)
    return max(
        float((a.cpu().double() - b).norm() / b.norm().clamp_min(1e-3))
        for a, b in zip(found, expected, strict=True)
        if b.numel()
    )


def path(cell: str, T: int, B: int, H: int, D: int, dtype: torch.dtype) -> str:
    if DEVICE == "cuda":
        weight = torch.empty(0, device="cuda", dtype=dtype)
        return _cuda.plan(weight, CELLS[cell], True, T, B, H, D, False)
    return torch.ops.fastrnn.cuda_plan(
        True, _cuda._NUMBERS[dtype], CELLS[cell].gates, T, B, H, D, False, *PLACES
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--few", action="store_true", help="three scans of two cells")
    few = parser.parse_args().few
    if DEVICE == "cuda" and (reason := no_kernels()):
        print(f"cannot run: {reason}")
        return 1
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    bad = 0
    for cell in ("lstm", "gru") if few else CELL_NAMES:
        for T, B, H, D, form, dtype in FEW if few else [*FEW, *MORE]:
            if DEVICE == "cpu" and dtype.itemsize == 2:
                continue
            error = worst_error(cell, T, B, H, D, form, dtype)
            wrong = not error <= LIMITS[dtype]
            bad += wrong
            where = path(cell, T, B, H, D, dtype)
            print("WRONG" if wrong else "right", cell, (T, B, H, D), form, dtype, f"{error:.1e}", where)
    return 1 if bad else 0


def no_kernels() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _cuda.no_kernel_reason(torch.empty(0, device="cuda"))


if __name__ == "__main__":
    sys.exit(main())
