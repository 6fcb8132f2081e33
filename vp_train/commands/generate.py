"""The command `vp-generate`: continue prompts with the model of a run, for a look at it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vp_train.commands.command import Parser, guarded, number, path_of, whole_number
from vp_train.commands.opened import RunCommand, parser_of, run_opened
from vp_train.commands.place import is_rank
from vp_train.commands.score import documents_of
from vp_train.config import ConfigError, printable

if TYPE_CHECKING:
    from vp_train.inference.opening import OpenRun

_MOST_SEED = 2**63 - 1
_UNFINISHED = "\ufffd"  # what a decoder writes for a character whose last bytes are still to come


def main() -> None:
    """Run the command."""
    guarded("vp-generate", lambda: _generate(sys.argv[1:]))


def _generate(arguments: Sequence[str]) -> int:
    options = _parser().parse_intermixed_args(arguments)
    num_tokens = whole_number({"--tokens": options.tokens}, "--tokens", 32)
    if options.top_k is not None:
        options.top_k = whole_number({"--top-k": options.top_k}, "--top-k", 40)
    options.temperature = number("--temperature", options.temperature, example="0.8")
    options.seed = whole_number(
        {"--seed": options.seed}, "--seed", 0, least=0, most=_MOST_SEED, example="1"
    )
    if options.top_k is not None and not options.temperature:
        raise ConfigError(
            "--top-k counts only with a --temperature above 0, which draws; drop one of the two"
        )
    prompts = _prompts(options)

    def body(run: OpenRun, is_first: bool) -> None:
        for place, prompt in enumerate(prompts):
            if is_first and place and not options.json:
                print()
            _continue(run, prompt, options, num_tokens, is_first)

    hint = "give a prompt as --prompt TEXT"
    command = RunCommand("vp-generate", __name__, body, hint, fills=False)
    return run_opened(command, options, _same_arguments(options, prompts))


def _parser() -> Parser:
    parser = parser_of(
        "vp-generate",
        "continues prompts with the model and the tokenizer of a run, on any layout\n\n"
        "This is for a look at a model, not for serving it: there is no cache of keys and values,\n"
        "so every token computes its whole prefix again, and prompts come one after the other.\n"
        "A continuation ends with the token that ends a document.  A token sees at most\n"
        "model.seq_length tokens before it.",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to continue; may be given several times; without: the start of a document",
    )
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="more prompts: the lines of a text or the documents of a .jsonl file; -: the lines of "
        "standard input",
    )
    parser.add_argument("--tokens", default="32", metavar="N", help="most tokens of each (32)")
    parser.add_argument(
        "--temperature",
        default="0",
        metavar="T",
        help="0: the most probable token; else a draw from the logits divided by T (0)",
    )
    parser.add_argument("--top-k", metavar="K", help="draw among the K most probable tokens (all)")
    parser.add_argument(
        "--seed",
        default="0",
        metavar="N",
        help="of the draws, which do not depend on the layout, but for the rounding of logits (0)",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each prompt")
    return parser


def _prompts(options: argparse.Namespace) -> list[str]:
    """Return all prompts, of which an empty one is the start of a document."""
    prompts: list[str] = list(options.prompt)
    if options.file == "-":
        if is_rank(os.environ):
            raise ConfigError("--file -: ranks of torchrun share no input; give --file FILE")
        try:
            lines = sys.stdin.buffer.read().decode().splitlines()
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ConfigError(
                f"--file -: line {line} of the input is not UTF-8; give a text in UTF-8"
            ) from None
        prompts += [line for line in lines if line.strip()]
    elif options.file is not None:
        path = path_of(options.file, "--file")
        if not path.is_file():
            raise ConfigError(f"--file {options.file} is not a file; give one with a prompt a line")
        found = documents_of(path, "text", by_line=True, warn=True)
        prompts += [document.text for document in found]
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            words = printable(prompt[:60])
            raise ConfigError(f"the prompt {words} is not UTF-8; give a text in UTF-8") from None
    if not prompts and options.file is not None:
        raise ConfigError(f"--file {options.file} holds no prompt")
    return prompts or [""]


def _same_arguments(options: argparse.Namespace, prompts: Sequence[str]) -> list[str]:
    """Return arguments for a new process that does the same, without input of its own."""
    words = [str(options.run), *options.settings]
    words += [f"--prompt={prompt}" for prompt in prompts]
    for name in ("tokens", "temperature", "top_k", "seed", "device", "dtype"):
        if (value := getattr(options, name)) is not None:
            words.append(f"--{name.replace('_', '-')}={value}")
    return [*words, "--json"] if options.json else words


def _continue(
    run: OpenRun, prompt: str, options: argparse.Namespace, num_tokens: int, is_first: bool
) -> None:
    """Continue a prompt on all ranks, and print its text as it comes on the first one."""
    import torch

    from vp_train.inference.generation import generate
    from vp_train.inference.opening import encode

    begun = encode(run, prompt).ids
    assert run.tokenizer is not None
    chosen: list[int] = []
    start = shown = run.tokenizer.decode(begun, skip_special_tokens=False)
    if is_first and not options.json:
        print(start, end="", flush=True)
    ids = torch.tensor([*run.begin_ids, *begun], dtype=torch.int64)
    sampled = {name: getattr(options, name) for name in ("temperature", "top_k", "seed")}
    for token in generate(run, ids, num_tokens, **sampled):
        chosen.append(token)
        if token == run.end_token:
            break
        text = run.tokenizer.decode([*begun, *chosen], skip_special_tokens=False)
        if text.endswith(_UNFINISHED) and len(chosen) < num_tokens:
            continue
        if is_first and not options.json:
            print(text[len(shown) :], end="", flush=True)
        shown = text
    if not is_first:
        return
    if options.json:
        values = {"prompt": prompt, "text": shown[len(start) :], "tokens": chosen}
        print(json.dumps(values | {"ended": chosen[-1] == run.end_token}), flush=True)
    else:
        print(flush=True)


if __name__ == "__main__":
    main()
