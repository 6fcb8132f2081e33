"""Run campaigns of random faults, and print as JSON how many cases failed.

    python -m tests.reliability [NAME ...] [--seed 1] [--scale 1.0] [--json FILE]

A campaign is a module with `campaign(seed, count)`, which returns a text for every case that went
wrong.  To add one, write the module and a line in CAMPAIGNS.  The exit code is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import signal
import sys
import time
from pathlib import Path

CAMPAIGNS = {  # name -> its module, and the cases of the long form
    "mutations": ("tests.reliability.mutations", 500),
    "overrides": ("tests.reliability.overrides", 1_000),
    "inputs": ("tests.reliability.inputs", 500),
    "crafted": ("tests.reliability.crafted", 257),
    "faults": ("tests.reliability.faults", 105),
    "kills": ("tests.reliability.kills", 200),
    "layouts": ("tests.reliability.layouts", 50),
}


def main() -> int:
    """Run the campaigns that the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *CAMPAIGNS], metavar="NAME")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of cases")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    results = []
    for name in options.names or CAMPAIGNS:
        module, cases = CAMPAIGNS[name]
        count, started = max(1, round(cases * options.scale)), time.monotonic()
        failures = importlib.import_module(module).campaign(options.seed, count)
        result = {
            "campaign": name,
            "seed": options.seed,
            "cases": count,
            "failures": failures,
            "seconds": round(time.monotonic() - started, 1),
        }
        results.append(result)
        print(f"{name}: {len(failures)} of {count} failed", file=sys.stderr, flush=True)
    text = json.dumps({"python": platform.python_version(), "results": results}, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(f"{text}\n")
    return int(any(result["failures"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
