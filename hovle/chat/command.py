"""Talk with a model about pictures in the terminal.

examples:
  hovle chat --model runs/demo/instruction_tuning/model --image a.png
  hovle chat --model DIR --image a.png --image b.png -q "what differs?"     one answer, for scripts

In a conversation: /image PATH adds a picture to the next question, /new starts over, /help names these commands, /quit
leaves. A path may be quoted and start with ~.
"""

import argparse
import io
import os
import sys

from ..options import add_picture_arguments, positive
from .conversation import Conversation

HELP = "Ask away. /image PATH adds a picture, /new starts over, /help says this again, /quit leaves."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle chat`."""
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--image", action="append", default=[], metavar="PICTURE", help="path or URL; repeatable")
    parser.add_argument("-q", "--question", help="answer this one question and exit")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="longest answer in tokens")
    parser.add_argument("--max-tiles", type=positive, help="most tiles of a picture; the model's own limit by default")
    add_picture_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer one question, or hold a conversation."""
    conversation = Conversation(
        args.model, args.max_new_tokens, args.max_tiles, args.max_image_tokens, args.label_images, args.image
    )
    if args.question is not None:
        _say(conversation.answer(args.question))
        return 0
    _say(HELP)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes of another encoding reach `_obey`, which refuses them
    while (line := _read_line()) is not None and line != "/quit":
        try:
            _obey(line, conversation)
        except ValueError as error:  # an unreadable picture must not end the conversation
            _say(f"! {error}")
    return 0


def _obey(line: str, conversation: "Conversation") -> None:
    """Do what a line of a conversation says: a command, or a question."""
    if any("\ud800" <= character <= "\udfff" for character in line):
        raise ValueError(
            "The line holds bytes that are no UTF-8; set the terminal, or the file that is piped in, to UTF-8."
        )
    command, _, rest = line.partition(" ")
    if line == "/new":
        conversation.restart()
    elif line == "/help":
        _say(HELP)
    elif command == "/image":
        conversation.add_images([_picture_source(rest.strip())])
    elif line.startswith("/"):
        raise ValueError(f"{command}: no command. {HELP} A question that starts with / needs a space before it.")
    elif line.strip():
        conversation.answer(line.strip(), stream=True)


def _picture_source(text: str) -> str:
    """Read what stands after /image: a URL, or a path as it would be written in a shell."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    if not text:
        raise ValueError("/image: expected a path or URL after it, for instance /image a.png")
    return os.path.expanduser(text) if text.startswith("~") else text


def _read_line() -> str | None:
    """The next line, or None at the end of input; a space before it is kept, as it may stand before a /."""
    try:
        return input("> ").rstrip()
    except EOFError:
        return None


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
