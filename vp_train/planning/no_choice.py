"""Why there is nothing to search, and what would change that."""

from __future__ import annotations

from vp_train.config import RunConfig
from vp_train.planning.batch import batch_of
from vp_train.planning.space import Space, fitting_batches, most_chunks, replicas_of, splits_of
from vp_train.units import count_words


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
            f"--keep {','.join(values)}: no split of {count_words(config.cluster.num_gpus, 'GPU')} "
            f"into dp x pp x tp, with tp within a node, has {typed}; keep fewer degrees, or change "
            "them"
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
    ways += [
        f"cluster.num_nodes={count} ({count_words(count * per_node, 'GPU')})" for count in nodes
    ]
    return (
        f"a batch of {count_words(batch, 'sequence')} does not split over "
        f"{count_words(num_gpus, 'GPU')}: dp must divide it, and with pp of at most "
        f"{count_words(config.model.num_layers, 'layer')} and tp within a node dp is one of "
        f"{shown}; use {', or '.join(ways)}"
    )
