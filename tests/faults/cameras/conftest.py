"""The scenarios are plain modules beside the tests, for measurements too: make them importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
