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
from pathlib import Path

import torch
from transformers import TextStreamer

from .modeling_hovle import HoVLEForConditionalGeneration
from .pictures import load_picture
from .processing_hovle import HoVLEProcessor

HELP = "Ask away. /image PATH adds a picture, /new starts over, /help says this again, /quit leaves."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle chat`."""
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--image", action="append", default=[], metavar="PICTURE", help="path or URL; repeatable")
    parser.add_argument("-q", "--question", help="answer this one question and exit")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="longest answer in tokens")
    parser.add_argument("--max-tiles", type=positive, help="most tiles of a picture; the model's own limit by default")
    add_picture_arguments(parser)


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what happens to the pictures of a prompt; the same in `hovle serve`."""
    parser.add_argument(
        "--max-image-tokens", type=positive, metavar="N", help="tokens all pictures of a prompt may take together"
    )
    parser.add_argument("--label-pictures", action="store_true", help="number the pictures of a prompt: Image-1, ...")


def positive(text: str) -> int:
    """Read a number from the command line that must be 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number


def run(args: argparse.Namespace) -> int:
    """Answer one question, or hold a conversation."""
    pictures = [load_picture(source) for source in args.image]  # before the model, which takes long to load
    conversation = Conversation(
        args.model, args.max_new_tokens, args.max_tiles, args.max_image_tokens, args.label_pictures
    )
    conversation.add_pictures(pictures)
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
        conversation.add_pictures([_picture_source(rest.strip())])
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


class Conversation:
    """A model, what was said so far, and pictures waiting for the next question.

    Args:
        model: Model folder or Hub id.
        max_new_tokens: Longest answer in tokens.
        max_tiles: Most tiles of a picture, or None for the model's own limit.
        max_image_tokens: Tokens all pictures shown so far may take together, or None for no limit.
        label_pictures: Number the pictures, so that questions can name them: Image-1, Image-2, ...
    """

    def __init__(
        self,
        model: str | os.PathLike,
        max_new_tokens: int = 256,
        max_tiles: int | None = None,
        max_image_tokens: int | None = None,
        label_pictures: bool = False,
    ):
        refuse_missing_folder(model)
        _refuse_missing_processor(model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor = HoVLEProcessor.from_pretrained(model)
        self.model = HoVLEForConditionalGeneration.from_pretrained(model).to(device).eval()
        self.max_new_tokens = max_new_tokens
        limits = {"max_tiles": max_tiles, "max_image_tokens": max_image_tokens}
        self.picture_kwargs = {name: limit for name, limit in limits.items() if limit is not None}
        self.label_pictures = label_pictures
        self.restart()

    def restart(self) -> None:
        """Forget what was said and shown."""
        self.messages: list[dict] = []
        self.pictures: list = []

    def add_pictures(self, sources: list) -> None:
        """Read pictures now, so that a broken one is refused at once, and show them with the next question."""
        self.pictures += [load_picture(source) for source in sources]

    def answer(self, question: str, stream: bool = False) -> str:
        """Ask a question after all that was said before; `stream` prints the answer as it comes."""
        content = [{"type": "image", "image": picture} for picture in self.pictures]
        messages = [*self.messages, {"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=self.picture_kwargs,
            label_pictures=self.label_pictures,
        ).to(self.model.device, self.model.dtype)
        streamer = None
        if stream:
            streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        generated = self.model.generate(
            **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, streamer=streamer
        )
        reply = self.processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        self.pictures = []
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": reply}]}]
        return reply


def refuse_missing_folder(model: str | os.PathLike) -> None:
    """Raise for a folder without a model; a mistyped path would be taken for a Hub id and asked for over the network.

    Hub ids are `owner/name`. Anything else is a path, and so is `first/second` where there is a folder `first`.

    Raises:
        ValueError: For a path without a folder, or without a config.json in it.
    """
    name = os.fspath(model)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir()
    if not looks_like_path or (Path(name) / "config.json").is_file():
        return
    expected = "expected a folder with config.json, or a Hub id such as owner/name."
    if Path(name).is_dir():
        raise ValueError(f"No model in {name}: {expected}")
    parent = Path(name).parent
    there = sorted(path.parent.name for path in parent.glob("*/config.json")) if parent.is_dir() else []
    beside = f" In {parent} there are {', '.join(there[:8])}{', ...' if there[8:] else ''}." if there else ""
    raise ValueError(f"No model in {name}, as there is no such folder: {expected}{beside}")


def _refuse_missing_processor(model: str | os.PathLike) -> None:
    """Raise for a folder with a model whose tokenizer or picture settings were not saved beside it."""
    wanted = ("tokenizer_config.json", "preprocessor_config.json")
    if Path(model).is_dir() and not (Path(model) / "processor_config.json").is_file():
        missing = [name for name in wanted if not (Path(model) / name).is_file()]
        if missing:
            raise ValueError(
                f"{os.fspath(model)} holds a model but no processor ({', '.join(missing)} missing): save one there, "
                "processor.save_pretrained(folder), or name the folder that has both."
            )


def _read_line() -> str | None:
    """The next line, or None at the end of input; a space before it is kept, as it may stand before a /."""
    try:
        return input("> ").rstrip()
    except EOFError:
        return None


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
