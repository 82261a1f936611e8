"""Talk with a model about pictures in the terminal.

examples:
  hovle chat --model runs/demo/instruction_tuning/model --image a.png
  hovle chat --model DIR --image a.png --image b.png -q "what differs?"     one answer, for scripts
  hovle chat --model GGUF_DIR --engine llama.cpp --quantization q8_0       what `hovle export --to gguf` wrote
  hovle chat --model DIR --engine openvino                                 what `--to openvino` wrote; also onnx
  hovle chat --model DIR --system "Answer in one word." --temperature 0.7
  hovle chat --model DIR --compile               graphs and a cache of fixed size: more tokens a second, after minutes

In a conversation: /image PATH adds a picture to the next question, /new starts over, /save FILE writes what was said
as JSON, /help names these commands, /quit leaves. A path may be quoted, as a shell writes it, start with ~ or be a
file:// URL; a picture that is dropped on the terminal needs no /image. Ctrl+C ends an answer, not the conversation.
"""

import argparse
import io
import sys

from ..export.gguf import QUANTIZATIONS
from ..options import add_picture_arguments, positive
from .conversation import Conversation
from .dropped import leading_pictures, local_name, picture_sources
from .engines import ENGINES

HELP = (
    "Ask away. /image PATH adds a picture, /new starts over, /save FILE keeps what was said, /help says this again, "
    "/quit leaves."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle chat`."""
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--image", action="append", default=[], metavar="PICTURE", help="path or URL; repeatable")
    parser.add_argument("-q", "--question", help="answer this one question and exit")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation begins")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="above 0, tokens are drawn by chance; 0, the default: none are"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="longest answer in tokens")
    parser.add_argument("--max-tiles", type=positive, help="most tiles of a picture; the model's own limit by default")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="torch",
        help="llama.cpp runs what `hovle export --to gguf` wrote, openvino and onnx what `--to` of their name did",
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="which file llama.cpp reads (default: f16)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the model: the first answer takes minutes, the others less"
    )
    add_picture_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer one question, or hold a conversation."""
    conversation = Conversation(
        args.model,
        args.max_new_tokens,
        args.max_tiles,
        args.max_image_tokens,
        args.label_images,
        [local_name(source) for source in args.image],
        args.system,
        args.temperature,
        args.engine,
        args.quantization,
        args.compile,
    )
    if args.question is not None:
        _say(conversation.answer(args.question))
        _tell_of_cut(conversation)
        return 0
    _say(HELP)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes of another encoding reach `_obey`, which refuses them
    while (line := _read_line()) is not None and line != "/quit":
        try:
            _obey(line, conversation)
        except (ValueError, OSError) as error:  # an unreadable picture must not end the conversation
            _say(f"! {error}")
        except KeyboardInterrupt:
            _say("\n! stopped; the conversation goes on, /quit leaves it")
    return 0


def _obey(line: str, conversation: "Conversation") -> None:
    """Do what a line of a conversation says: a command, or pictures and a question."""
    if any("\ud800" <= character <= "\udfff" for character in line):
        raise ValueError(
            "The line holds bytes that are no UTF-8; set the terminal, or the file that is piped in, to UTF-8."
        )
    command, _, rest = line.partition(" ")
    pictures, question = leading_pictures(line)
    if line == "/new":
        conversation.restart()
    elif line == "/help":
        _say(HELP)
    elif command == "/image":
        _add(_named(picture_sources(rest.strip()), "/image", "a path or URL", "a.png"), conversation)
    elif command == "/save":
        (path,) = _named([rest.strip()] if rest.strip() else [], "/save", "the name of a new file", "said.json")
        conversation.save(local_name(path))
    elif pictures:
        _add(pictures, conversation)
        if question:
            _ask(question, conversation)
    elif line.startswith("/"):
        raise ValueError(f"{command}: no command. {HELP} A question that starts with / needs a space before it.")
    elif line.strip():
        _ask(line.strip(), conversation)


def _ask(question: str, conversation: "Conversation") -> None:
    conversation.answer(question, stream=True)
    _tell_of_cut(conversation)


def _add(sources: list[str], conversation: "Conversation") -> None:
    conversation.add_images(sources)
    count = len(conversation.images)
    _say(f"{count} picture{'s' * (count > 1)} for the next question")


def _named(names: list[str], command: str, expected: str, example: str) -> list[str]:
    if not names:
        raise ValueError(f"{command}: expected {expected} after it, for instance {command} {example}")
    return names


def _tell_of_cut(conversation: "Conversation") -> None:
    """Say so where an answer was cut; not on the standard output, which scripts read."""
    if conversation.stopped_by:
        sys.stderr.write(f"! the answer was cut: it reached {conversation.stopped_by}\n")


def _read_line() -> str | None:
    """The next line, or None at the end of input; a space before it is kept, as it may stand before a /."""
    try:
        return input("> ").rstrip()
    except EOFError:
        return None


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
