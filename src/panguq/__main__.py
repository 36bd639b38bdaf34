"""`python -m panguq`: the command line, as torchrun starts it."""

import sys

from panguq.cli import main

sys.exit(main())
