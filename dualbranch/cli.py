"""The command `dualbranch` (also `python -m dualbranch`): one sub-command per entry of `COMMANDS`, each a module of `commands/`.

A command's module has `add_arguments(parser)` and `run(args) -> exit code`, and is imported when it is asked for. Errors a user can mend
become one line and exit code 2, as in `infer.py`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from dualbranch.infer import guarded

#: Name -> module in `dualbranch.commands` and what `dualbranch --help` says of it.
COMMANDS = {
    "import": ("importing", "make a checkpoint of ours out of a public model"),
    "convert": ("converting", "give a public model a fast branch and a gate, and heal it by self-distillation"),
    "export": ("exporting", "write a branch as a checkpoint, a Hugging Face folder or a GGUF file"),
    "quantize": ("quantizing", "write a checkpoint with 16, 8 or 4 bits per weight, for inference"),
    "compile": ("compiling", "make machine code for decoding with a model, once per machine"),
    "prune": ("pruning", "make a smaller conventional model, cut by importance and refitted"),
    "eval": ("evaluating", "perplexity of text, or accuracy on generated problems, by route and budget"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv` (None: the process's arguments); returns the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        args = build_parser(argv[0] if argv else None).parse_args(argv)
        return args.run(args)

    return guarded(command)


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of `command` only: the modules of the others are not imported."""
    parser = argparse.ArgumentParser(prog="dualbranch", description="Small language models with a fast and a slow branch.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module_name, text) in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == command:
            module = importlib.import_module(f"dualbranch.commands.{module_name}")
            module.add_arguments(one)
            one.set_defaults(run=module.run)
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments every command shares: which model, and consent to its terms."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint or run of ours, a Hugging Face folder, a .gguf file, a known name, or owner/name")
    parser.add_argument("--accept-gemma-terms", action="store_true", help="you have read and accept https://ai.google.dev/gemma/terms")


if __name__ == "__main__":
    sys.exit(main())
