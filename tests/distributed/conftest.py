"""The modules beside the tests, which the processes that they start import, too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
