"""The data of every training step, and the plan that the batch-size ramp gives a step."""

from __future__ import annotations

from vp_train.assembly import RankModel
from vp_train.config import RunConfig
from vp_train.data import Batch, Source
from vp_train.data.ahead import Ahead
from vp_train.mesh import Mesh
from vp_train.pipeline.executor import PlacedBatch
from vp_train.planning.plan import RunPlan, replan


class Batches:
    """The batches of one rank.  That of the next step is made while a step runs.

    Steps take the tokens of the training samples in their order.

    contents: the hashes of the corpora.
    """

    def __init__(
        self, config: RunConfig, plan: RunPlan, mesh: Mesh, source: Source, model: RankModel
    ) -> None:
        self._config, self._plan, self._mesh = config, plan, mesh
        self._source, self._model, self.contents = source, model, source.contents
        self._plans = {plan.work.num_microbatches: plan}  # by the microbatches of a step
        # A step, and the tokens that steps up to it have used, or that were left out.
        self._used = (0, 0)
        self._ahead = Ahead(self.make, config.run.steps)

    def take(self, step: int) -> tuple[Batch, PlacedBatch | None]:
        """Return `make(step)`, and start making the batch of the next step."""
        return self._ahead.take(step)

    def make(self, step: int) -> tuple[Batch, PlacedBatch | None]:
        """Return this replica's data of `step`, and on CUDA its copy on the device."""
        data_rank, num_replicas = self._mesh.data_rank, self._mesh.degrees.dp
        plan, start = self.plan_of(step), self.tokens_until(step - 1)
        batch = self._source.train_batch(start, plan.work.num_microbatches, data_rank, num_replicas)
        if self._config.run.device == "cpu":
            return batch, None
        return batch, self._model.trainer.place(batch.tokens, batch.labels)

    def plan_of(self, step: int) -> RunPlan:
        """Return the plan of `step`, which the batch-size ramp may give fewer microbatches."""
        count = self._plan.ramp.at(step)
        if count not in self._plans:
            self._plans[count] = replan(self._config, self._plan, count)
        return self._plans[count]

    def tokens_until(self, step: int) -> int:
        """Return the tokens that the steps up to `step` use, with those that were left out."""
        done, tokens = self._used
        ramp, work = self._plan.ramp, self._plan.work
        microbatches = self._mesh.degrees.dp * (ramp.until(step) - ramp.until(done))
        return tokens + microbatches * work.num_tokens

    def trained(self, step: int) -> dict[str, float]:
        """Return how much text the steps up to `step` have used, by key of metrics.jsonl.

        A pass is one time through the text, of which every corpus of a blend makes another number.
        """
        tokens, one = self.tokens_until(step), self._source.tokens_of_pass
        return {"tokens": tokens} | ({} if one is None else {"passes": tokens / one})

    def seek(self, step: int, tokens: int) -> None:
        """Let the steps after `step` take what follows the first `tokens` tokens."""
        self._used = step, tokens
