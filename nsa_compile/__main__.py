"""`python -m nsa_compile`: see `python -m nsa_compile --help`."""

import sys

from nsa_compile.cli.main import main

sys.exit(main())
