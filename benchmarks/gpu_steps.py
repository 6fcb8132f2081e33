"""The steps of `gpu_check.py`, each run as `python gpu_steps.py NUMBER cuda|cpu RESULT`.

A step takes a `Where` and a `Report`.  What it imports of vp_train it imports itself, so that a
broken part fails its own step only.  On the CPU sizes are tiny, and checks that only a GPU can
pass are not judged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu.attention import packed, rules
from gpu.common import ROOT, Report, Where
from gpu.float8 import float8_layers
from gpu.layers import layers
from gpu.offloading import offloading
from gpu.runs import profiled, training
from gpu.setup import collectives, cuda_tests, imports
from gpu.stalls import stall
from gpu.vocabulary import accumulation, vocabulary
from gpu.waits import spinning, synchronisations


@dataclass(frozen=True, slots=True)
class Step:
    """A step, and the most seconds it may take.  What is `timed` has the GPU for itself."""

    name: str
    run: Callable[[Where, Report], None]
    limit_seconds: float
    timed: bool = False


STEPS: dict[int, Step] = {
    1: Step("imports and attention", imports, 100),
    2: Step("collectives of one rank", collectives, 60),
    3: Step("stalls and delays", stall, 80, timed=True),
    4: Step("accumulated products", accumulation, 40, timed=True),
    5: Step("the CUDA tests", cuda_tests, 170),
    6: Step("S and T", vocabulary, 90, timed=True),
    7: Step("one layer", layers, 75, timed=True),
    8: Step("synchronisations", synchronisations, 60),
    9: Step("spinning kernels", spinning, 40, timed=True),
    10: Step("packed lengths", packed, 60, timed=True),
    11: Step("profile against plan", profiled, 150, timed=True),
    12: Step("training", training, 170),
    13: Step("float8", float8_layers, 100, timed=True),
    14: Step("softcaps and windows", rules, 110, timed=True),
    15: Step("activations in host memory", offloading, 80, timed=True),
}


def main(arguments: Sequence[str]) -> None:
    number, device, result = arguments
    sys.path.insert(0, str(ROOT))  # for the tests, which are no package that is installed
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    path = Path(result)
    STEPS[int(number)].run(Where(torch.device(device), path.parent), Report(path))


if __name__ == "__main__":
    main(sys.argv[1:])
