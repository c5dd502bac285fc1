"""What numpy reaches, as a share of the measured roofline: a limit that is exceeded was not one.

    python benchmarks/roofline.py [--rounds 7] [--quick]

Each round measures the roofline anew and then times numpy's matrix product (768 x 768, float32) and its sum of 64 MiB:
the best of 15 and of 5. Both are measured undisturbed only on a machine that does nothing else. The last line is the
median share of the peak with its 95 % interval (the range, with fewer than 6 rounds).
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import median_of, report

from tvmlab.targets import target

SIZE = 768
LEFT, RIGHT = np.ones((SIZE, SIZE), "float32"), np.ones((SIZE, SIZE), "float32")
BIG = np.ones(16 << 20, "float32")


def best_s(call: Callable[[], object], repeats: int) -> float:
    """The shortest of so many calls, in seconds."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def shares(folder: Path) -> tuple[float, float]:
    """One round: numpy's GFLOP/s over the measured peak, and its GB/s over the measured bandwidth."""
    limit = target("cpu", cache_dir=folder).roofline
    if limit is None:
        raise SystemExit("the roofline could not be measured; run tvmlab doctor")
    gflops = 2 * SIZE**3 / best_s(lambda: LEFT @ RIGHT, 15) / 1e9
    gbs = BIG.nbytes / best_s(BIG.sum, 5) / 1e9
    print(f"peak {limit.peak_gflops:.0f} GFLOP/s, numpy {gflops:.0f}; {limit.bandwidth_gbs:.1f} GB/s, numpy {gbs:.1f}")
    return gflops / limit.peak_gflops, gbs / limit.bandwidth_gbs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    asked = parser.parse_args()
    found = []
    for _ in range(2 if asked.quick else asked.rounds):
        with tempfile.TemporaryDirectory(prefix="roofline-") as folder:
            found.append(shares(Path(folder)))
    peaks, bandwidths = zip(*found, strict=True)
    report("roofline.bandwidth", *median_of(list(bandwidths)), 1.0)
    report("roofline", *median_of(list(peaks)), 1.0)


if __name__ == "__main__":
    main()
