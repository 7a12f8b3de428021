"""`python -m dualbranch` is the command `dualbranch`."""

import sys

from dualbranch.cli import main

sys.exit(main())
