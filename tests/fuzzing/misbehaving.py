"""Cases that raise, crash, hang and exit, to see that the harness survives and names each."""

from __future__ import annotations

import ctypes
import os
import time


def run_case(seed: int) -> str:
    if seed == 3:
        raise ValueError("case three")
    if seed == 5:
        ctypes.string_at(0)
    if seed == 7:
        time.sleep(3600)
    if seed == 9:
        os._exit(4)
    return "agreed" if seed % 2 else "both refused"
