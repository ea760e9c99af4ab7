"""`python -m megatron_vico COMMAND`, the form that torchrun starts."""

import sys

from megatron_vico.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
