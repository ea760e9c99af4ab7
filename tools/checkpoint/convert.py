"""`vico convert ...`, where Megatron users look for it."""

import sys

from megatron_vico.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
