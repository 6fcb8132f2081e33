"""Why there is nothing to search, and what would change that."""

from __future__ import annotations

from vp_train.config import RunConfig
from vp_train.planning.choice import (
    Space,
    batch_of,
    fitting_batches,
    most_chunks,
    replicas_of,
    splits_of,
)


def nothing_kept_words(config: RunConfig, space: Space) -> str:
    """Return why no choice has all settings that are kept, and what to change."""
    values = space.kept.values
    degrees = {
        name: values[f"parallel.{name}"]
        for name in ("dp", "pp", "tp")
        if f"parallel.{name}" in values
    }
    splits = [
        split
        for split in splits_of(config)
        if all(getattr(split, name) == value for name, value in degrees.items())
    ]
    if not splits:
        typed = ", ".join(f"parallel.{name}={value}" for name, value in degrees.items())
        return (
            f"--keep {','.join(values)}: no split of {config.cluster.num_gpus:,} GPUs into dp x pp "
            f"x tp, with tp within a node, has {typed}; keep fewer degrees, or change them"
        )
    chunks = values.get("schedule.num_chunks")
    pipelines = {split.pp for split in splits if split.pp > 1}
    if chunks is not None and pipelines:
        pp, num_layers = min(pipelines), config.model.num_layers
        most = most_chunks(pp, num_layers)
        if chunks > most:
            return (
                f"--keep schedule.num_chunks={chunks}: with parallel.pp={pp} that is "
                f"{chunks * pp} stages, too many for model.num_layers={num_layers}; "
                f"keep at most {most}"
            )
    ((constraint, _),) = space.excluded.most_common(1)
    return f"--keep {','.join(values)} leaves no choice; ruled out most: {constraint}"


def no_choice_words(config: RunConfig) -> str:
    """Return what is wrong where no split of the GPUs can run the batch, and what would work."""
    batch, num_gpus, replicas = batch_of(config), config.cluster.num_gpus, replicas_of(config)
    batches, nodes = fitting_batches(config)
    shown = ", ".join(f"{dp:,}" for dp in replicas[:3]) + (
        f", ... {replicas[-1]:,}" if len(replicas) > 3 else ""
    )
    ways = [f"a batch of {' or '.join(f'{size:,}' for size in batches)} sequences"]
    per_node = config.cluster.gpus_per_node
    ways += [f"cluster.num_nodes={count} ({count * per_node:,} GPUs)" for count in nodes]
    return (
        f"a batch of {batch:,} sequences does not split over {num_gpus:,} GPUs: dp must divide it, "
        f"and with pp of at most {config.model.num_layers} layers and tp within a node dp is one "
        f"of {shown}; use {', or '.join(ways)}"
    )
