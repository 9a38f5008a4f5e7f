"""On the path of a process whose wall clock a test may set: `time.time` is off by what a file says."""

import mmap
import os
import struct
import time

if path := os.environ.get("TEST_CLOCK"):
    with open(path, "rb") as file:
        offset = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
    true_time, true_time_ns = time.time, time.time_ns

    def shifted_time() -> float:
        return true_time() + struct.unpack("d", offset[:8])[0]

    def shifted_time_ns() -> int:
        return true_time_ns() + int(struct.unpack("d", offset[:8])[0] * 1e9)

    time.time, time.time_ns = shifted_time, shifted_time_ns
