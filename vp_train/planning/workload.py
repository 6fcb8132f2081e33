"""The work of a step, from which its FLOPs and bytes follow.

All of planning computes with this value.  It is made from the settings in one place, `Workload.of`.
Pure arithmetic, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vp_train.config import ModelConfig, RunConfig, VocabConfig
from vp_train.config.whole import refuse_with_graphs
from vp_train.model import shape
from vp_train.planning.degrees import Degrees, check_float8_split, check_tensor_split

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Workload:
    """The model, its split over ranks, and the microbatches of one replica's step.

    `dtype`, `linear_dtype`, `device`, `compile` and `cuda_graphs` are those of `run`.  The layers
    of each stage are not part of it, because they depend on the schedule.  `share` is the model
    with layers of the size of one tensor-parallel share; it follows from `model` and `degrees`.
    """

    model: ModelConfig
    vocab: VocabConfig
    degrees: Degrees
    sequence_parallel: bool
    num_microbatches: int
    micro_batch_size: int
    dtype: str
    device: str
    linear_dtype: str = "compute"
    compile: str = "auto"
    cuda_graphs: bool = False
    share: ModelConfig = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Made once, because checking the settings of a model costs more than to compute with them.
        share = shape.tensor_share(self.model, self.degrees.tp)
        object.__setattr__(self, "share", share)

    @classmethod
    def of(cls, config: RunConfig, degrees: Degrees) -> Workload:
        """Return the work of a step of `config`, split as `degrees` say.

        Raises ConfigError if tensor parallelism cannot split the model so, or if that does not go
        with linear layers in float8 or with CUDA graphs.
        """
        sequences, num_ranks = config.parallel.sequence_parallel, degrees.num_ranks
        check_tensor_split(config.model, degrees.tp, sequences=sequences, num_ranks=num_ranks)
        if config.run.linear_dtype == "float8":
            check_float8_split(config.model, degrees.tp)
        if config.run.cuda_graphs:
            offloaded = config.parallel.offload_activations
            refuse_with_graphs("parallel.tp", degrees.tp, 1)
            refuse_with_graphs("parallel.offload_activations", offloaded, 0)
        return cls(
            model=config.model,
            vocab=config.vocab,
            degrees=degrees,
            sequence_parallel=config.parallel.sequence_parallel,
            num_microbatches=config.num_microbatches,
            micro_batch_size=config.micro_batch_size,
            dtype=config.run.dtype,
            device=config.run.device,
            linear_dtype=config.run.linear_dtype,
            compile=config.run.compile,
            cuda_graphs=config.run.cuda_graphs,
        )

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def in_float8(self) -> bool:
        """Return whether the linear layers form outputs and input gradients in float8."""
        return self.linear_dtype == "float8"

    @property
    def compiles_layers(self) -> bool:
        """Return whether elementwise work of layers is compiled, if there is a compiler."""
        values = self.num_tokens * self.share.ffn_hidden_size
        return shape.compiles_layers(
            self.compile, self.model, values, self.item_bytes, on_cuda=self.on_cuda
        )

    @property
    def num_tokens(self) -> int:
        """The tokens of one microbatch, T."""
        return self.micro_batch_size * self.model.seq_length

    @property
    def item_bytes(self) -> int:
        """The bytes of one weight or activation."""
        return _ITEM_BYTES[self.dtype]

    @property
    def precise_bytes(self) -> int:
        """The bytes of one gradient, statistic or optimizer state: at least those of fp32."""
        return max(4, self.item_bytes)

    @property
    def sequence_ranks(self) -> int:
        """The number of ranks over which sequence parallelism splits the tokens."""
        return self.degrees.tp if self.sequence_parallel else 1

    @property
    def message_bytes(self) -> int:
        """The bytes of [T, H] in the dtype of activations.

        A hop, the broadcast C0 and an all-reduce over the tensor-parallel ranks move this much.
        """
        return self.item_bytes * self.num_tokens * self.model.hidden_size

    @property
    def input_gradient_bytes(self) -> int:
        """The bytes of one shard's term of dL/dx: [T, H] in vocab.sum_dtype."""
        summed = self.item_bytes if self.vocab.sum_dtype == "compute" else self.precise_bytes
        return summed * self.num_tokens * self.model.hidden_size

    @property
    def layer_flops(self) -> int:
        """The forward FLOPs of one layer on one microbatch, of all tensor-parallel ranks."""
        return shape.layer_flops(self.model, self.num_tokens)

    @property
    def linear_flops(self) -> int:
        """The part of `layer_flops` that is the products of linear layers."""
        return 2 * shape.layer_matrix_parameters(self.model) * self.num_tokens

    @property
    def step_flops(self) -> float:
        """The model FLOPs of a step of one replica: forward, and twice as many for the backward.

        The output layer counts 2 V H per token, the embedding nothing, recomputation nothing.
        """
        model, num_tokens = self.model, self.num_microbatches * self.num_tokens
        layers = model.num_layers * shape.layer_flops(model, num_tokens)
        return 3.0 * (layers + 2 * model.vocab_size * model.hidden_size * num_tokens)

    @property
    def held_values(self) -> float:
        """The number of values per token and vocabulary row that are held from S to T."""
        match self.vocab.backend:
            case "recompute":
                return 1 - self.vocab.recompute_fraction
            case "reference":
                return 2.0
            case _:
                return 1.0

    def layer_bytes(self, recompute: str) -> int:
        """Return the activation bytes that one layer keeps per microbatch and rank.

        recompute: what its backward recomputes, one of RECOMPUTE.
        """
        return shape.layer_activation_bytes(
            self.share,
            self.micro_batch_size,
            self.item_bytes,
            on_cuda=self.on_cuda,
            recompute=recompute,
            sequence_ranks=self.sequence_ranks,
        )
