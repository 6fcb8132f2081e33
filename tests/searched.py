"""The lines of a search as `vp-plan` shows them."""

from __future__ import annotations

from typing import Any

from vp_train.commands.search_beside import compared_with
from vp_train.commands.search_words import search_lines
from vp_train.config import RunConfig
from vp_train.planning.found import Limits, SearchResult
from vp_train.planning.report import PlanReport


def shown_lines(
    config: RunConfig,
    limits: Limits,
    result: SearchResult,
    typed: PlanReport | None = None,
    **options: Any,
) -> list[str]:
    """Return what is printed of a result with all that it is compared with, see `search_lines`."""
    return search_lines(
        config, limits, result, compared_with(config, limits, result), typed, **options
    )
