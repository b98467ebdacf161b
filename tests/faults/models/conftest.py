"""The scenarios are plain modules, for the bench as well; pytest imports none of them by itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
