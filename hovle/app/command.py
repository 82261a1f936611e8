"""A page to try models in, for a browser: show pictures, ask, and see how the model sees them.

  hovle app runs/demo/instruction_tuning/model       at http://127.0.0.1:7860; pip install 'hovle[app]'
  hovle app MODEL OTHER                              a choice of models; one of them is in memory at a time
  hovle app MODEL --host 0.0.0.0                     for others in the network; the page asks nobody for a password

Pictures are dropped on the page, or picked; a file that cannot be read is named there, and the others are taken. The
answer comes word by word, Stop ends it. Beside the chat stand the pictures as the model sees them, cut into tiles,
and, when you press "Where does it look?", the tokens of the last answer: their colour is the share of their attention
that falls on pictures, a click shows where it falls. That runs the model once more over all that was said.

Another model begins a new chat, for which the pictures stay. One answer is generated at a time, others wait in a
queue. 32 chats with 240 megapixels of pictures in all are kept, and none longer than its page is open; files that were
uploaded are deleted after an hour. The page loads nothing from the network.
"""

import argparse

from ..export.needs import need
from ..options import add_picture_arguments, port, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle app`."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="model folder or Hub id; the first is loaded")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=port, default=7860, help="port to listen at (default: 7860)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="longest answer in tokens (default: 256)")
    parser.add_argument("--engine", choices=["torch"], default="torch", help="what runs the model")
    add_picture_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Show the page until interrupted."""
    need("The page", "hovle[app]", "gradio")
    from .desk import Desk
    from .models import Models
    from .page import serve

    models = Models(args.models, args.max_new_tokens, args.max_image_tokens, args.label_images)
    serve(Desk(models), args.host, args.port)
    return 0
