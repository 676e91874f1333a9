"""`python -m prismer` is the command `prismer`."""

import sys

from prismer.cli import main

sys.exit(main())
