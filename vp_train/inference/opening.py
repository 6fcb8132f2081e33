"""The model of a run, opened by one process or by all ranks of a job together."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from vp_train.assembly import EvaluationModel, build_for_evaluation
from vp_train.checkpoint.store import find
from vp_train.checkpoint.training import load_parameters
from vp_train.communication.nccl import require_float8, require_gpu
from vp_train.config import ConfigError, RunConfig
from vp_train.data.tokenizer import (
    begin_of_run,
    begin_token_id,
    beyond,
    end_token_id,
    load_tokenizer,
    token_in,
    tokenizer_config_in,
)
from vp_train.inference.layout import Opening, opening_of
from vp_train.mesh import Mesh, build_mesh
from vp_train.planning.plan import make_plan

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True, slots=True)
class OpenRun:
    """The model of a run: whole on this process, or this rank's share of it.

    checkpoint: where its weights were read.
    tokenizer: None where the run had none, as on synthetic data.
    mesh: the ranks that have the model together.  All of them make the same calls.
    end_name: the token that ends a document, as the run has kept it; None if it has not.
    begin_name: the token in front of every document of training, None if there was none.
    """

    config: RunConfig
    checkpoint: Path
    tokenizer: Tokenizer | None
    model: EvaluationModel
    mesh: Mesh
    end_name: str | None = None
    begin_name: str | None = None

    @property
    def end_token(self) -> int | None:
        """The id of the token that ends a document; None if the tokenizer has none."""
        if self.tokenizer is None:
            return None
        name = self.config.data.end_token or self.end_name
        try:
            return end_token_id(self.tokenizer, name, self.config.model.vocab_size)
        except ConfigError:
            return None

    @property
    def begin_ids(self) -> list[int]:
        """The ids in front of a text: those of `begin_name`, or none.

        Raises ConfigError if the tokenizer has no such token, or the model has not.
        """
        if self.tokenizer is None or self.begin_name is None:
            return []
        return [begin_token_id(self.tokenizer, self.begin_name, self.config.model.vocab_size)]


def open_run(directory: str | Path, *, device: str = "cpu", dtype: str | None = None) -> OpenRun:
    """Load the newest checkpoint of a run, or the one at `directory`, of any layout.

    `dtype`: what to compute in, as run.dtype, without float8; None: as the run did.  In a job of
    several ranks, whose default process group exists, all of them call this; the layout is then the
    run's own, with as many replicas as fit.  run.compile does not count: layers run uncompiled, and
    on a CPU in 16 bits kernels are built, unless TORCHDYNAMO_DISABLE=1 is set in this process.
    Raises ConfigError where there is no checkpoint, where there are no settings, or where the ranks
    do not fit the layout.
    """
    num_ranks = dist.get_world_size() if dist.is_initialized() else None
    return opened(opening_of(directory, num_ranks=num_ranks, device=device, dtype=dtype))


def opened(opening: Opening) -> OpenRun:
    """Load the model with these settings.  Collective over the default group of their ranks.

    A single process makes that group itself.  `opening.compiles` is left to the caller, because
    `compiling.turn_off` counts for a whole process.  Raises ConfigError like `open_run`, without
    the GPU to compute on, and for a run in float8 on a GPU without it.
    """
    config = opening.config
    require_gpu(config.run, "device cuda", "compute on the device cpu")
    require_float8(config.run)
    plan = make_plan(config, opening.degrees.num_ranks)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    mesh = build_mesh(plan.degrees, plan.problem, config.run)
    model = build_for_evaluation(config, plan, mesh)
    checkpoint = find(opening.directory, mesh.world)
    load_parameters(checkpoint, config, model)
    tokenizer = _tokenizer_of(opening)
    begin = config.data.begin_token
    if begin is None and not opening.chooses_begin:
        begin = _begin_name(opening.run)
    return OpenRun(config, checkpoint, tokenizer, model, mesh, _end_name(opening.run), begin)


@contextmanager
def leaving_no_group() -> Iterator[None]:
    """Destroy the default process group at the end if it was made inside, with all other groups.

    Their threads end then.  As Python shuts down, gloo's threads may abort the process.
    """
    has_group = dist.is_initialized()
    try:
        yield
    finally:
        if dist.is_initialized() and not has_group:
            dist.destroy_process_group()
            gc.collect()  # some are in cycles


def encode(run: OpenRun, text: str) -> Encoding:
    """Return the tokens of a text, in which what spells a special token is ordinary text.

    `run.begin_ids` are not among them.  Raises ConfigError where the run has no tokenizer, or the
    model not all of the tokens.
    """
    if run.tokenizer is None:
        raise ConfigError(
            f"{run.checkpoint}: the run has no tokenizer; give one with data.tokenizer=PATH"
        )
    encoding = run.tokenizer.encode(text, add_special_tokens=False)
    largest, vocab_size = max(encoding.ids, default=0), run.config.model.vocab_size
    if largest >= vocab_size:
        raise ConfigError(beyond(f"the text has token {largest},", largest, vocab_size))
    return encoding


def _tokenizer_of(opening: Opening) -> Tokenizer | None:
    """Return the tokenizer that the caller has named, else that of the run, None if it has none."""
    config, path = opening.config, opening.run / "tokenizer.json"
    given = config.data.tokenizer
    # Runs of earlier versions kept none.
    if given is not None and (opening.chooses_tokenizer or not path.is_file()):
        path = Path(given).expanduser()
    if not path.is_file() and not opening.chooses_tokenizer:
        return None
    tokenizer = load_tokenizer(path, config.model.vocab_size)
    tokenizer.encode_special_tokens = True  # as in the corpora of training
    return tokenizer


def _end_name(run: Path) -> str | None:
    """Return the token that ended the documents of training, None if the run does not say."""
    return token_in(tokenizer_config_in(run), "eos_token")


def _begin_name(run: Path) -> str | None:
    """Return the token that a run has put in front of its documents, None if there is none.

    An import does not say how it was trained: it has no config.yaml.
    """
    return begin_of_run(run) if (run / "config.yaml").is_file() else None
