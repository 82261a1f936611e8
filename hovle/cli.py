"""The `hovle` command: a list of subcommands, each imported only when it is called."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .errors import StopRunError, printable
from .requirements import unmet

COMMANDS = {
    "tiles": ("hovle.chat.tiles", "draw how a picture is cut into tiles and count its tokens"),
    "chat": ("hovle.chat.command", "talk with a model about pictures in the terminal"),
    "caption": ("hovle.caption.command", "ask one question about many pictures, answers as JSON lines"),
    "serve": ("hovle.serve.command", "answer requests of OpenAI's chat API with a model"),
    "app": ("hovle.app.command", "a page in the browser: show pictures, ask, see tiles and where answers look"),
    "convert": ("hovle.convert.command", "turn a released checkpoint into a hovle model, and back"),
    "export": ("hovle.export.command", "write a model for engines that know nothing of hovle"),
    "fetch": ("hovle.assets.command", "download the real model, teacher and data the demo uses"),
    "plan": ("hovle.train.plan.command", "predict memory, hours and cost of training stages before they run"),
    "data": ("hovle.data", "draw training pictures, let a language model write text, or look through a recipe's data"),
    "train": ("hovle.train.__main__", "run one training stage from a YAML recipe, and report on runs"),
    "eval": (
        "hovle.eval",
        "score a model on benchmarks, or look inside: attention, embeddings, what it kept of its language",
    ),
    "merge": ("hovle.eval.merge", "mix two models part by part, and measure the mixtures"),
    "bench": ("hovle.bench", "measure how fast a part of hovle is on this machine"),
    "doctor": ("hovle.machine.doctor", "say what works on this machine and what to install for more"),
    "demo": (
        "hovle.demo.command",
        "show what a model answers about twelve pictures, or train a small one on this machine",
    ),
}
"""Subcommand -> (module, one line of help). A module offers `add_arguments(parser)` and `run(args) -> exit code`;
its docstring is the subcommand's help text. `ACTIONS` of a module are subcommands of its own: name -> module."""


MODEL_OPTIONS = frozenset({"model", "models", "first", "second", "src"})
"""Options and arguments of commands that name a trained model or several."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: Command line without the program's name; by default that of this process.

    Returns:
        Exit code: 0 done, 1 refused with a message, 2 wrong usage.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return _run_command(argv[0], COMMANDS[argv[0]][0], argv[1:])
    parser = argparse.ArgumentParser(
        prog="hovle",
        description="HoVLE: a monolithic vision-language model with a holistic embedding, open and trainable.",
        epilog="`hovle COMMAND --help` explains one command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary)
    parser.parse_args(argv)
    return 2  # unreachable: parse_args leaves on help and on errors


def _refuse(name: str, message: str) -> int:
    print(f"hovle {name}: {printable(message)}", file=sys.stderr)  # noqa: T201 - this is the command's output
    return 1


def find_shipped(args: argparse.Namespace) -> None:
    """Put folders in the place of names of shipped models, whichever option or argument names a model."""
    options = MODEL_OPTIONS & vars(args).keys()
    if not options:
        return
    from .packaged import resolve_model  # needs torch, which is what `hovle doctor` looks for

    for option in options:
        named = getattr(args, option)
        if isinstance(named, str):
            setattr(args, option, os.fspath(resolve_model(named)))
            if getattr(args, option) != named and getattr(args, "served_model_name", "") is None:
                args.served_model_name = named  # by which clients know it, and not by a folder of the cache
        elif isinstance(named, list):
            setattr(args, option, [os.fspath(resolve_model(name)) for name in named])


def _run_command(name: str, module_name: str, argv: Sequence[str]) -> int:
    if name != "doctor" and (problem := unmet()) is not None:
        return _refuse(name, f"{problem} (`hovle doctor` looks at the rest.)")
    module = importlib.import_module(module_name)
    actions = getattr(module, "ACTIONS", {})
    if argv and argv[0] in actions:
        return _run_command(f"{name} {argv[0]}", actions[argv[0]], argv[1:])
    parser = argparse.ArgumentParser(
        prog=f"hovle {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(argv)  # options may stand between key=value arguments
    try:
        find_shipped(args)
        return module.run(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("hovle"):
            raise
        return _refuse(name, f"{error.name} is missing; `hovle doctor` says what brings it.")
    except (ValueError, OSError, StopRunError) as error:
        return _refuse(name, str(error))
    except KeyboardInterrupt:
        print(f"\nhovle {name}: interrupted", file=sys.stderr)  # noqa: T201 - this is the command's output
        return 130
