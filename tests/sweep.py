"""Runs random configurations in float64 against torch.nn and reports every difference.

    python tests/sweep.py --configs 1000 --seed 0

Ends with status 1 if there is any. A configuration can be run again alone with ``--seed S --configs 1``.
"""

import argparse
import sys
import time
from collections import Counter

import parity
import torch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--configs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first configuration")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--small", action="store_true", help="no wide configurations")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    isa = torch.ops.fastrnn.cpu_isa()
    print(f"torch {torch.__version__}, {isa}, {torch.get_num_threads()} threads", flush=True)
    started, bad, kinds = time.perf_counter(), 0, Counter()
    for seed in range(options.seed, options.seed + options.configs):
        config = parity.draw(seed, large=not options.small)
        kinds[config.kind] += 1
        if found := parity.check(config):
            bad += 1
            print(f"DIFFERENT {config}", *found, sep="\n    ", flush=True)
    counts = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
    seconds = time.perf_counter() - started
    print(f"{options.configs} configurations ({counts}) in {seconds:.0f} s: {bad} different")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
