"""`python -m align_engine` is `align`."""

import sys

from align_engine.cli import main

sys.exit(main())
