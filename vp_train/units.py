"""Text forms of byte counts, durations, losses and numbers of things."""

from __future__ import annotations

# The part by which predicted times must differ for one to win.  Predictions are less exact.
AS_FAST = 0.01


def plural(count: int, name: str) -> str:
    """Return `name` as it stands behind a count: 1 -> rank, 2 -> ranks, 0 -> microbatches."""
    if count == 1:
        return name
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"


def count_words(count: int, name: str) -> str:
    """Return a number of things in words: 1 rank, 1,024 microbatches."""
    return f"{count:,} {plural(count, name)}"


def loss_words(loss: float) -> str:
    """Format a loss with as many digits as a run, a sweep and a report show: 2 -> 2.0000."""
    return f"{loss:.4f}"


def clock(seconds: float) -> str:
    """Format seconds as a clock shows them: 75 -> 1:15, 3675 -> 1:01:15."""
    minutes, rest = divmod(int(seconds), 60)
    return (
        f"{minutes}:{rest:02d}"
        if minutes < 60
        else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
    )


def human_bytes(count: float) -> str:
    """Format a number of bytes with its unit: 1536 -> 1.5 KiB, 2 ** 41 -> 2,048.00 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def large_bytes(count: float) -> str:
    """Format bytes like `human_bytes`, but many GiB without fractions: 1,238 GiB."""
    return f"{count / 2**30:,.0f} GiB" if count >= 100 * 2**30 else human_bytes(count)


def amount(count: float) -> str:
    """Return a count to be followed by a unit, in three digits: 23_100_000 -> `23.1 M`."""
    for power, letter in zip(range(24, 3, -3), "YZEPTGM", strict=True):
        scaled = f"{count / 10**power:.3g}"
        if float(scaled) >= 1:
            return f"{scaled} {letter}"
    return f"{count:,.0f} "


def is_as_fast(seconds: float, than: float) -> bool:
    """Return whether the fewer seconds save less than `AS_FAST` of the others: neither wins."""
    return abs(seconds - than) < AS_FAST * max(seconds, than)


def is_faster(seconds: float, than: float) -> bool:
    """Return whether seconds are fewer than others by `AS_FAST` or more."""
    return seconds < than and not is_as_fast(seconds, than)


def compared(seconds: float, than: float) -> str:
    """Return how much slower or faster `seconds` are than others: `1.5% slower`.

    It is `as fast` where neither wins, see `is_as_fast`.
    """
    change = seconds / than - 1
    if is_as_fast(seconds, than):
        return "as fast"
    return f"{abs(change):.1%} {'slower' if change > 0 else 'faster'}"
