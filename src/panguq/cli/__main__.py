"""`python -m panguq.cli`."""

import sys

from panguq.cli import main

sys.exit(main())
