"""One pipeline stage: its layers, and their initial values, which do not depend on the layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vp_train.config import ModelConfig
from vp_train.model.attention import Documents
from vp_train.model.completion import Completion
from vp_train.model.elementwise import Fuse, plain
from vp_train.model.linear import PLAIN, ColumnLinear, LinearProducts, RowLinear, WeightGradStore
from vp_train.model.megatron import DecoderLayer, join_sequence, rotary_table, split_sequence
from vp_train.model.norm import build_norm

_NO_MICROBATCH = -1
_ROWS_PER_BLOCK = 1024  # vocabulary rows that share a random generator


class Stage(nn.Module):
    """The layers with the global indices `layers`, and on the last stage the final norm.

    A stage may have no layers.  The first stage scales the embeddings and adds the learned
    positions, if the model has them.  Parameters are named by global layer, `layers.7...`, and
    initialised from (seed, global layer) alone.  `recompute` is that of ParallelConfig; with a
    split backward, pass I recomputes.  `products` form the products of the linear layers.  `fuse`
    says how elementwise work runs.  `num_offloaded` of the layers, the first ones, are offloaded.

    Attributes:

    splits: the slices of the parameters that are split over the tensor-parallel ranks of `group`.
    partial: the parameters whose gradients must still be summed over `group`: the norms of heads
        and, with `split_sequences`, everything that sees only a part of the tokens.
    units: the names of parameters whose gradients complete together, in order of completion: of
        the MLP and of the attention of each layer.
    """

    scale: Tensor | None
    positions: nn.Parameter | None
    rotary: Tensor | None
    local_rotary: Tensor | None

    def __init__(
        self,
        model: ModelConfig,
        layers: Sequence[int],
        *,
        final_norm: bool,
        first: bool = False,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup,
        seed: int,
        products: LinearProducts = PLAIN,
        fuse: Fuse = plain,
        recompute: str = "none",
        split_sequences: bool = False,
        num_offloaded: int = 0,
    ) -> None:
        super().__init__()
        self._num_offloaded = num_offloaded
        # With sequence parallelism only the vocabulary layers see whole sequences.
        self._splits_input = group if split_sequences and first else None
        self._joins_output = group if split_sequences and final_norm else None
        self._sequence_parts = group.size() if split_sequences else 1
        self._sequence_shape = model.seq_length // self._sequence_parts, model.hidden_size
        self.weight_grads, self._linear_products = WeightGradStore(), products
        self._local = {str(index) for index in layers if model.is_local(index)}
        self.layers = nn.ModuleDict(
            {
                str(index): DecoderLayer(
                    model,
                    index,
                    dtype,
                    device,
                    group=group,
                    store=self.weight_grads,
                    products=products,
                    fuse=fuse,
                    recompute=recompute,
                    split_sequences=split_sequences,
                )
                for index in layers
            }
        )
        self.splits = {
            f"{name}.{parameter}": split
            for name, module in self._linear_layers()
            for parameter, split in module.splits.items()
        }
        for index, layer in self.layers.items():
            self._initialise(f"layers.{index}.", layer, model, _generator(seed, f"layer {index}"))
        self.final_norm = build_norm(model, dtype, device, fuse) if final_norm else None
        self._divisor = model.logit_divisor
        self._register_input(model, dtype, device, seed if first else None)
        self._register_rotary(model, dtype, device)
        self.partial = self._partial_parameters(group.size(), split_sequences)
        self.units = self._in_order_of_completion()
        owners = {name: unit for unit, names in enumerate(self.units) for name in names}
        self._unit_of = {parameter: owners[name] for name, parameter in self.named_parameters()}
        # How many products of a unit a drain of `weight_grads` computes.
        self._products = [0] * len(self.units)
        for _, module in self._linear_layers():
            self._products[self._unit_of[module.weight]] += 1
        self._need: Callable[[Sequence[str]], None] | None = None
        self._hooks: Callable[[], AbstractContextManager[None]] = nullcontext
        for number, (_, layer) in enumerate(self._decoder_layers()):
            layer.on_middle(partial(self._read, 2 * number + 1))

    def warm_up(self, micro_batch_size: int) -> None:
        """Run what layers compute forward and backward, so that no step compiles code.

        Compiled code is shared by all layers of a kind.  Zeros are added to the gradients of
        parameters that have one.  If it fails, nothing of it is left.  Collective over `group`.
        """
        weight = next(self.parameters(), None)
        lacking = [parameter for parameter in self.parameters() if parameter.grad is None]
        if weight is not None:
            try:
                self._warm_up(weight, micro_batch_size)
            finally:
                self.weight_grads.discard(_NO_MICROBATCH)
                for parameter in lacking:
                    parameter.grad = None

    def _warm_up(self, weight: Tensor, micro_batch_size: int) -> None:
        of_kinds = {name in self._local: layer for name, layer in self.layers.items()}
        s, h = self._sequence_shape
        num_tokens = s * self._sequence_parts
        whole, (table, _) = (num_tokens,) * micro_batch_size, self._tables(num_tokens)
        # On CUDA packed documents have kernels of their own.
        packed = [Documents.on(weight.device, whole)] if weight.is_cuda else []
        for documents in (None, *packed):
            x = weight.new_zeros(s * micro_batch_size, h, requires_grad=True)
            y = x
            for layer in of_kinds.values():
                y = layer(y, micro_batch_size, table, documents)
            y = y if self.final_norm is None else self.final_norm(y)
            with self.weight_grads.deferring(_NO_MICROBATCH):
                torch.autograd.grad(y, x, torch.zeros_like(y))
            if weight.grad is not None:
                self.weight_grads.drain(_NO_MICROBATCH)
            with torch.no_grad():  # a validation would compile attention again
                for layer in of_kinds.values() if weight.is_cuda else ():
                    layer(x, micro_batch_size, table, documents)

    def _decoder_layers(self) -> Iterator[tuple[str, DecoderLayer]]:
        for index, layer in self.layers.items():
            assert isinstance(layer, DecoderLayer)
            yield index, layer

    def _linear_layers(self) -> Iterator[tuple[str, ColumnLinear | RowLinear]]:
        for name, module in self.named_modules():
            if isinstance(module, ColumnLinear | RowLinear):
                yield name, module

    def _register_input(
        self, model: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int | None
    ) -> None:
        """Register what the first stage does to the embeddings; `seed` is None on the others."""
        scale = positions = None
        factor = model.embedding_multiplier
        if model.embedding_scale:
            factor *= model.hidden_size**0.5
        if seed is not None and factor != 1:
            # Rounded to the compute dtype, as in the published models.
            scale = torch.tensor(factor, dtype=dtype, device=device)
        if seed is not None and model.positions == "learned":
            values = torch.randn(
                model.seq_length, model.hidden_size, generator=_generator(seed, "positions")
            )
            positions = nn.Parameter((values * model.init_std).to(dtype=dtype, device=device))
        self.register_parameter("positions", positions)
        self.register_buffer("scale", scale, persistent=False)

    def _register_rotary(
        self, model: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Register the tables of rotary embeddings, of all layers and of those that are local."""
        rotary = local_rotary = None
        if model.positions == "rope":
            rotary = local_rotary = rotary_table(model, local=False, dtype=dtype, device=device)
            if model.rope_local_base is not None:
                local_rotary = rotary_table(model, local=True, dtype=dtype, device=device)
        self.register_buffer("rotary", rotary, persistent=False)
        self.register_buffer("local_rotary", local_rotary, persistent=False)

    def _tables(self, num_tokens: int) -> list[tuple[Tensor, Tensor] | None]:
        """Return the cosines and sines of the first tokens, for all layers and for local ones."""
        tables: list[tuple[Tensor, Tensor] | None] = []
        for rotary in (self.rotary, self.local_rotary):
            if rotary is None:
                tables.append(None)
            else:
                cosines, sines = rotary[:, :num_tokens].unbind()
                tables.append((cosines, sines))
        return tables

    def _partial_parameters(self, num_ranks: int, split_sequences: bool) -> frozenset[str]:
        """Return the value of `partial` for `num_ranks` tensor-parallel ranks."""
        if num_ranks == 1:
            return frozenset()
        of_heads = ("q_layernorm", "k_layernorm")
        return frozenset(
            name
            for name, _ in self.named_parameters()
            if name not in self.splits
            and name != "positions"
            and (split_sequences or any(part in name for part in of_heads))
        )

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Map [s, b, h] to [s, b, h], for s at most model.seq_length.

        With `split_sequences` over n ranks both are [s / n, b, h], except the first stage's input
        and the last stage's output.  Attention stays within the `segments` [b, s], if given.
        """
        lengths = None if segments is None else document_lengths(segments)
        documents = None if lengths is None else Documents.on(x.device, lengths)
        self._read(0)
        if self.scale is not None:
            x = x * self.scale
        if self.positions is not None:
            x = x + _by_token(self.positions, x.shape[:2], lengths)
        if self._splits_input is not None:
            x = split_sequence(x, self._splits_input)
        s, b, h = x.shape
        tables = self._tables(s * self._sequence_parts)
        x = x.flatten(0, 1)  # once, and not in every operation of a layer
        for number, (name, layer) in enumerate(self.layers.items()):
            self._read(2 * number)
            with self._hooks() if number < self._num_offloaded else nullcontext():
                x = layer(x, b, tables[name in self._local], documents)
        if self.final_norm is not None:
            x = self.final_norm(x)
            if self._divisor != 1:
                x = x / self._divisor  # the output layer is linear, so this divides the logits
        x = x.view(s, b, h)
        return x if self._joins_output is None else join_sequence(x, self._joins_output)

    def _in_order_of_completion(self) -> tuple[tuple[str, ...], ...]:
        """Return the parameter names of both halves of each layer, the last ones first.

        The final norm belongs to the first unit, the learned positions to the last one.
        """
        halves = [
            [f"layers.{index}.{name}" for name in half]
            for index, layer in self._decoder_layers()
            for half in layer.halves()
        ]
        units = halves[::-1] or [[]]
        for name, _ in self.named_parameters():
            if not name.startswith("layers."):
                units[-1 if name == "positions" else 0].append(name)
        return tuple(tuple(unit) for unit in units if unit)

    def fixed_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the weights of the linear layers do not change."""
        return self._linear_products.fixed_weights()

    @contextmanager
    def reading(self, need: Callable[[Sequence[str]], None]) -> Iterator[None]:
        """Within this context call `need` with parameters before a pass reads them, unit by unit.

        The pass inside must be a forward, and when the context ends `need` has been called with all
        parameters.
        """
        self._need = need
        try:
            yield
        finally:
            self._need = None
        for unit in self.units[::-1]:
            need(unit)

    @contextmanager
    def offloading(self, hooks: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Within this context run the layers of a forward that are offloaded inside `hooks()`.

        They are the first `num_offloaded` ones.
        """
        self._hooks = hooks
        try:
            yield
        finally:
            self._hooks = nullcontext

    def _read(self, half: int) -> None:
        """Wait for the parameters of half a layer, counted in the order of the forward."""
        if self._need is not None and self.units:
            self._need(self.units[len(self.units) - 1 - half])

    @contextmanager
    def completing(self, done: Callable[[Sequence[str]], None]) -> Iterator[None]:
        """Within this context call `done` with each of `units` whose gradients are complete.

        The pass inside must be the last of the step that adds to them: a backward, or a drain of
        `weight_grads`.  Units that it has not announced by its end are announced then.
        """
        completion = Completion(self.units, done)
        left = list(self._products)

        def reached(weight: nn.Parameter) -> None:
            # What a backward has come through is complete: autograd accumulates into parameters
            # before it does anything else.
            completion.up_to(self._unit_of[weight] - 1)

        def computed(weight: nn.Parameter) -> None:
            unit = self._unit_of[weight]
            left[unit] -= 1
            if not left[unit]:
                completion.up_to(unit)

        with self.weight_grads.watching(reached=reached, computed=computed):
            yield
        completion.finish()

    @torch.no_grad()
    def _initialise(
        self, prefix: str, layer: nn.Module, model: ModelConfig, generator: torch.Generator
    ) -> None:
        """Initialise the parameters of one layer in place.

        Matrices are normal with init_std, divided by sqrt(2 L) if they write to the residual
        stream.  Norms are the identity and biases 0.
        """
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if model.zero_centred_norm or name.endswith("bias") else 1.0)
                continue
            writes = "linear_proj" in name or "linear_fc2" in name
            std = model.init_std / math.sqrt(2 * model.num_layers) if writes else model.init_std
            split = self.splits.get(prefix + name)
            whole = torch.randn(
                parameter.shape if split is None else split.whole_shape(parameter.shape),
                generator=generator,
            )
            parameter.copy_((whole if split is None else split.part(whole)) * std)


def _by_token(positions: Tensor, shape: tuple[int, ...], lengths: tuple[int, ...] | None) -> Tensor:
    """Return the rows of `positions` for tokens of `shape` [s, b], as [s, b or 1, h].

    Positions count from the start of each document.
    """
    s, b = shape
    if lengths is None:
        return positions[:s, None]
    return torch.cat([positions[:length] for length in lengths]).view(b, s, -1).transpose(0, 1)


def document_lengths(segments: Tensor) -> tuple[int, ...] | None:
    """Return the lengths of the documents in `segments` [b, s], in the order of the sequences.

    A document is a run of equal segments.  Returns None if every sequence is one document.  Pass
    `segments` on the CPU: on CUDA this call waits for the device.
    """
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero().flatten().tolist()
    if len(starts) == len(segments):
        return None
    return tuple(stop - start for start, stop in pairwise([*starts, segments.numel()]))


def init_rows(
    name: str,
    start: int,
    stop: int,
    model: ModelConfig,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return rows [start, stop) of the initial matrix `name`, `embedding` or `output`: [R, H].

    Every block of rows has its own generator, so a shard has the same values as those rows of the
    whole matrix.
    """
    rows = torch.empty(stop - start, model.hidden_size, dtype=dtype, device=device)
    for block in range(start // _ROWS_PER_BLOCK, math.ceil(stop / _ROWS_PER_BLOCK)):
        first = block * _ROWS_PER_BLOCK
        values = torch.randn(
            _ROWS_PER_BLOCK, model.hidden_size, generator=_generator(seed, f"{name} {block}")
        )
        low, high = max(start, first), min(stop, first + _ROWS_PER_BLOCK)
        rows[low - start : high - start] = values[low - first : high - first] * model.init_std
    return rows


def _generator(seed: int, what: str) -> torch.Generator:
    """Return a CPU generator for `what`, independent of all others with the same seed."""
    mixed = seed
    for byte in what.encode():
        mixed = (mixed * 1_000_003 + byte) % (1 << 63)
    return torch.Generator().manual_seed(mixed)
