"""Measures sigmoid, tanh, exp and log(sigmoid) of every instruction set against wider arithmetic.

    python tests/accuracy.py

prints the largest error of each in units in the last place (ulp) of the true value.
"""

from dataclasses import dataclass

import numpy as np

FUNCTIONS = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "exp": np.exp,
    "log_sigmoid": lambda x: np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))),
}
TYPES = (np.float32, np.float64)
WIDER = {np.float32: np.float64, np.float64: np.longdouble}


def sample(dtype, count: int = 2_000_000, seed: int = 0) -> np.ndarray:
    """Evenly spread over the bit patterns of all numbers, dense where the functions bend, and the corners."""
    info, bits = np.finfo(dtype), np.uint32 if dtype is np.float32 else np.uint64
    r = np.random.default_rng(seed)
    size = np.iinfo(bits).max
    everywhere = r.integers(0, size, count, dtype=bits, endpoint=True).view(dtype)
    bend = r.uniform(-25, 25, count).astype(dtype)
    limit = 110 if dtype is np.float32 else 750
    wide = r.uniform(-limit, limit, count // 2).astype(dtype)
    small = (10.0 ** r.uniform(-12, 0, count // 2) * r.choice([-1, 1], count // 2)).astype(dtype)
    denormal = (r.integers(0, 2**20, 1000) * info.smallest_subnormal).astype(dtype)
    corners = [
        0.0,
        info.tiny,
        info.smallest_subnormal,
        info.eps,
        info.max,
        np.inf,
        1,
        10,
        20,
        88.7,
        104,
        709.7,
        746,
    ]
    corners = np.array(corners, dtype=dtype)
    with np.errstate(over="ignore"):
        above, below = np.nextafter(corners, dtype(np.inf)), np.nextafter(corners, dtype(0))
    corners = np.concatenate((corners, above, below))
    x = np.concatenate((everywhere, bend, wide, small, denormal, -denormal, corners, -corners))
    return x[~np.isnan(x)]


def truth(function: str, x: np.ndarray) -> np.ndarray:
    """The function in the next wider type, exact to a small part of an ulp of x's type."""
    wide = x.astype(WIDER[x.dtype.type])
    with np.errstate(over="ignore", under="ignore"):
        return FUNCTIONS[function](wide)


@dataclass
class Accuracy:
    ulp: float  # the largest error where the truth is a normal number
    at: float
    below_normal: float  # the largest error where it is smaller, in smallest normal numbers


def measure(got: np.ndarray, x: np.ndarray, function: str) -> Accuracy:
    expected = truth(function, x)
    dtype = x.dtype.type
    tiny = np.finfo(dtype).tiny
    with np.errstate(invalid="ignore", under="ignore", over="ignore"):
        error = np.abs(got.astype(expected.dtype) - expected)
        error[np.isinf(got) & (got == expected.astype(dtype))] = 0  # beyond the largest number
        unit = np.spacing(np.clip(np.abs(expected), tiny, np.finfo(dtype).max).astype(dtype))
        normal = np.abs(expected) >= tiny
        ulps = np.where(normal, error / unit, 0)
        below = np.where(normal, 0, error / tiny)
    worst = int(np.argmax(ulps))
    return Accuracy(float(ulps[worst]), float(x[worst]), float(below.max()))


def main() -> None:
    from conftest import build_internals

    internals = build_internals()
    print("isa       function  type     max error             beyond the normal range")
    for isa in internals.instruction_sets():
        for function in FUNCTIONS:
            for dtype in TYPES:
                x = sample(dtype)
                found = measure(getattr(internals, function)(isa, x), x, function)
                print(
                    f"{isa:9} {function:9} {dtype.__name__}  {found.ulp:.2f} ulp at {found.at:<12.6g}"
                    f" {found.below_normal:.2g} of the smallest normal number"
                )


if __name__ == "__main__":
    main()
