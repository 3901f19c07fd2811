"""The example plugins are not installed for the tests: their folders are put on the path."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in sorted(Path(__file__).parent.glob("autoround-*")):
    sys.path.append(str(folder))
