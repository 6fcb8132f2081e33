"""Score text with the model of a run, in one process: three lines from a directory to numbers.

    run = vp_train.open_run("runs/default")
    (logprobs,) = vp_train.score(run, ["def add(a, b):"])
    print(logprobs.mean())

Many ranks score together with `RankModel.evaluator`; docs/vocabulary.md has an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from vp_train.assembly import RankModel, build_rank
from vp_train.checkpoint.store import find
from vp_train.checkpoint.training import load_weights
from vp_train.config import (
    ConfigError,
    CostConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    VocabConfig,
)
from vp_train.mesh import build_mesh
from vp_train.planning.plan import make_plan
from vp_train.settings import load_config, override
from vp_train.vocab.loss import IGNORE_INDEX

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True, slots=True)
class OpenRun:
    """The model of a run, whole on this process; `checkpoint` is where its weights were read.

    `tokenizer` is None where the run had none, as on synthetic data.
    """

    config: RunConfig
    checkpoint: Path
    tokenizer: Tokenizer | None
    model: RankModel


def open_run(directory: str | Path, *, device: str = "cpu", dtype: str | None = None) -> OpenRun:
    """Load the newest checkpoint of a run, or the one at `directory`, of any layout.

    `dtype`: what to compute in, as run.dtype; None: as the run did.  Raises ConfigError where there
    is no checkpoint, where there are no settings, or in a job of several processes.
    """
    path = Path(directory).expanduser().absolute()
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    if not run.is_dir():
        raise ConfigError(f"{run} is not a directory; give that of a run")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} has no config.yaml; give the directory of a run")
    words = [
        override("run.root", str(run.parent)),
        override("run.name", run.name),
        "run.resume=true",
    ]
    config = _for_one_process(load_config(words), device, dtype)
    _be_alone()
    plan = make_plan(config, 1)
    mesh = build_mesh(plan.degrees, plan.problem, config.run)
    model = build_rank(config, plan, mesh)
    checkpoint = find(path, mesh.world)
    load_weights(checkpoint, config, model)
    return OpenRun(config, checkpoint, _tokenizer_of(run, config), model)


def score(run: OpenRun, texts: Sequence[str] | Sequence[Tensor]) -> list[Tensor]:
    """Return the log-probability of every token but the first of each text, fp32 [n - 1].

    A text is a string, or the int64 ids [n] of its tokens.  A token is predicted from at most
    seq_length tokens before it: a longer text is scored in windows, and each window begins with the
    last token of the one before.  Raises ConfigError for strings where the run has no tokenizer,
    and IndexError for ids that the vocabulary does not have.
    """
    if isinstance(texts, str | Tensor):
        raise TypeError("texts is a list: give [text] for a single text")
    return [_score_ids(run, _ids_of(run, text)) for text in texts]


def _score_ids(run: OpenRun, ids: Tensor) -> Tensor:
    width, scored = run.config.model.seq_length, []
    for start in range(0, len(ids) - 1, width):
        tokens, labels = ids[start : start + width], ids[start + 1 : start + width + 1]
        padded = torch.nn.functional.pad(labels, (0, len(tokens) - len(labels)), value=IGNORE_INDEX)
        found = run.model.evaluator.logprobs(tokens[None, None], padded[None, None])
        assert found is not None
        scored.append(found[0, 0, : len(labels)].float().cpu())
    return torch.cat(scored) if scored else torch.zeros(0)


def _ids_of(run: OpenRun, text: str | Tensor) -> Tensor:
    if isinstance(text, Tensor) and text.dim() == 1 and text.dtype is torch.int64:
        return text
    if not isinstance(text, str):
        raise TypeError(f"a text is a string or an int64 tensor [n] of token ids, not {text!r:.80}")
    return torch.tensor(encode(run, text).ids, dtype=torch.int64)


def encode(run: OpenRun, text: str) -> Encoding:
    """Return the tokens of a text.  Raises ConfigError where the run has no tokenizer."""
    if run.tokenizer is None:
        raise ConfigError(
            f"{run.checkpoint}: the run has no tokenizer; give token ids instead of text"
        )
    return run.tokenizer.encode(text, add_special_tokens=False)


def _for_one_process(config: RunConfig, device: str, dtype: str | None) -> RunConfig:
    """Return the settings of a run for a process that has all of its layers and one microbatch."""
    run = replace(
        config.run,
        device=device,
        comm_backend="gloo",
        dtype=dtype or config.run.dtype,
        resume=False,
        init_from=None,
        eval_microbatches=1,
    )
    return replace(
        config,
        run=run,
        parallel=ParallelConfig(pp=1, dp=1, tp=1),
        schedule=ScheduleConfig(),
        vocab=VocabConfig("none"),
        optim=replace(config.optim, name="adamw", offload=False),
        cost=CostConfig(),
        num_microbatches=1,
        micro_batch_size=1,
    )


def _be_alone() -> None:
    """Make the default process group one of this process, unless it is that already."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    elif dist.get_world_size() > 1:
        raise ConfigError(
            "open_run loads a whole model into one process, but this job has "
            f"{dist.get_world_size()}; use RankModel.evaluator, as docs/vocabulary.md shows"
        )


def _tokenizer_of(run: Path, config: RunConfig) -> Tokenizer | None:
    kept = run / "tokenizer.json"
    given = None if kept.is_file() else config.data.tokenizer  # runs of earlier versions kept none
    path = kept if given is None else Path(given).expanduser()
    if not path.is_file():
        return None
    from vp_train.data.tokenizer import load_tokenizer

    return load_tokenizer(path, config.model.vocab_size)
