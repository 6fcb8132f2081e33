"""A benchmark that starts itself once for each rank of a job on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any


def result_of_job(script: str, num_ranks: int, port: int, words: Sequence[str]) -> Any:
    """Run `script` as every rank, and return what its first rank has printed as JSON.

    The ranks get the words `--as-rank DIRECTORY`, an empty directory that they share, and `words`.
    They meet at `port` of this machine.
    """
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(num_ranks),
        }
        command = [sys.executable, script, "--as-rank", directory, *words]
        processes = [
            subprocess.Popen(
                command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
            )
            for rank in range(num_ranks)
        ]
        said = [process.communicate()[0] for process in processes]
        assert not any(process.returncode for process in processes)
    return json.loads(said[0])
