"""`python -m tinygpt.train ...`: the same as `tinygpt train ...`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
