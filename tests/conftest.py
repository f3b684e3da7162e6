"""The scripts live in the repository's root: make them importable from anywhere pytest is started."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
