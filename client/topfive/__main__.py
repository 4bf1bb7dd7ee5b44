"""`python -m topfive`: the command line."""

import sys

from topfive.cli import main

sys.exit(main())
