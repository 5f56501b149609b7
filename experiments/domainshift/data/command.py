"""Check a data set, fetch PACS, or look at augmented images: the command data.py.

python experiments/data.py verify [PATH]                 is this folder usable, and is it PACS?
python experiments/data.py fetch [--to DIR] [--from SRC] get PACS from its public home
python experiments/data.py augmentation FILE.png --data toy --source photo
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainshift.data import open_data
from domainshift.data.fetch import HUB_DATASET, fetch
from domainshift.data.pacs import DEFAULT_ROOT
from domainshift.data.verify import verify
from domainshift.errors import BadInput
from domainshift.progress import Screen, show_any_name

PROBLEMS, BAD_INPUT = 1, 2  # exit statuses


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="data.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    commands = result.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="read every image; compare PACS with the official")
    command.add_argument("path", nargs="?", type=Path, default=DEFAULT_ROOT, metavar="PATH",
                         help="folder of a data set (default: data/PACS)")  # fmt: skip
    command = commands.add_parser("fetch", help=f"get PACS from {HUB_DATASET}, then verify it")
    command.add_argument("--to", type=Path, default=DEFAULT_ROOT, metavar="FOLDER",
                         help="where to write (default: data/PACS)")  # fmt: skip
    command.add_argument("--from", dest="source", type=Path, metavar="FILE_OR_FOLDER",
                         help="local parquet file(s) instead of a download")  # fmt: skip
    command = commands.add_parser("augmentation", help="draw images as epochs of training see them")
    command.add_argument("path", type=Path, metavar="FILE", help="the picture, .png or .pdf")
    command.add_argument("--data", default="toy", help="folder, or toy (default: %(default)s)")
    command.add_argument("--source", help="domain (default: the first)")
    command.add_argument("--image-size", type=int, default=224, help="(default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all right, 1 problems with the images, 2 bad input."""
    show_any_name()
    args, screen = parser().parse_args(arguments), Screen()
    path = (args.to if args.command == "fetch" else args.path).expanduser()
    try:
        if args.command == "augmentation":
            return augmentation(path, args, screen)
        if args.command == "fetch":
            fetch(path, args.source and args.source.expanduser(), screen)
        problems = verify(path, screen)
    except (BadInput, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        return BAD_INPUT
    for problem in problems:
        print(f"problem: {problem}")
    return PROBLEMS if problems else 0


def augmentation(path: Path, args: argparse.Namespace, screen: Screen) -> int:
    import torch

    from domainshift.data.augmentation import draw_augmentation

    data = open_data(args.data)
    domain = data.load(args.source or data.domains[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    largest = draw_augmentation(path, domain, args.image_size, args.seed, device)
    screen.say(f"{path}: largest difference of a pixel {largest:.2f} of 255")
    return 0
