"""What command lines of several commands share."""

import argparse


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what happens to the pictures of a prompt; the same in `hovle serve`."""
    parser.add_argument(
        "--max-image-tokens", type=positive, metavar="N", help="tokens all pictures of a prompt may take together"
    )
    parser.add_argument(
        "--label-images", "--label-pictures", action="store_true", help="number the pictures of a prompt: Image-1, ..."
    )


def port(text: str) -> int:
    """Read a port from the command line; 0 is any that is free."""
    number = int(text)
    if not 0 <= number <= 65535:  # beyond, the system would listen at the rest of a division
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, found {number}")
    return number


def positive(text: str) -> int:
    """Read a number from the command line that must be 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {number}")
    return number
