"""``python -m sn72engine`` is the ``sn72engine`` command."""

from __future__ import annotations

import sys

from sn72engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
