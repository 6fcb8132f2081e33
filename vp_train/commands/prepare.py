"""The command `vp-prepare`: tokenize the data of a run, so that training starts at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vp_train.commands.command import Command, run
from vp_train.config import RunConfig
from vp_train.failures import EXIT_OK

_EXAMPLES = """\
  vp-prepare data=text data.path=corpus          text or .jsonl files under corpus
  vp-prepare data=text data.path=corpus data.tokenizer=tokenizer.json model.vocab_size=128256
  vp-prepare data=text data.path=corpus_text_document.idx data.tokenizer=tokenizer.json
                                                 tokens of Megatron-LM: a .bin with its .idx"""

_READS = (
    *("data.name", "data.path", "data.blend", "data.jsonl_field", "data.validation"),
    *("data.tokenizer", "data.end_token", "data.begin_token"),
    *("data.cache_dir", "data.workers", "model.vocab_size"),
)


def main() -> None:
    """Run the command."""
    purpose = "tokenizes text and stores it for training"
    run(Command("vp-prepare", purpose, _prepare, _EXAMPLES, reads=_READS))


def _prepare(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    from vp_train.data import describe, prepare_run, prepare_validation
    from vp_train.data.corpus import spare_rows, text_warnings, with_names
    from vp_train.data.origin import begin_warnings

    corpora = prepare_run(config, progress=True)
    named = prepare_validation(config.data, config.model.vocab_size, corpora, progress=True)
    much = text_warnings(config.data, corpora, named)
    begin = begin_warnings(config, corpora)
    pairs = with_names(config.data, corpora, named)
    corpora += tuple(named.values())
    described = (describe(one, name if len(pairs) > 1 else "") for name, one in pairs)
    print("\n".join(described) or f"data={config.data.name}: nothing to prepare")
    for line in (*much, *begin, *spare_rows(config, corpora)):
        print(f"warning  {line}")
    return EXIT_OK
