"""`python -m prismer` runs the command `prismer`."""

import sys

from prismer.cli.main import main

sys.exit(main())
