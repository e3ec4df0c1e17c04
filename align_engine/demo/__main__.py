"""`python -m align_engine.demo` is `align demo`."""

import sys

from align_engine.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
