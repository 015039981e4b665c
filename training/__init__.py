"""Training of SAIL-VL2: `python -m training --help`."""

from training import interrupt as interrupt  # notes the parent process before torch is imported, which takes seconds
