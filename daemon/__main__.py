"""``python -m daemon`` is the command ``hyperbell``."""

import sys

from daemon.cli import main

sys.exit(main())
