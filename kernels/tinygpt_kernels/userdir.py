"""Where things live that are the user's and can be made again: prepared text, measured tiles. Needs no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """$TINYGPT_CACHE, else tinygpt in the platform's cache directory."""
    if chosen := os.environ.get("TINYGPT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "tinygpt"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tinygpt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinygpt"
