"""A volume that is full: a small file system of the test's own where root may mount one, a limit on files elsewhere."""

import os
import resource
import subprocess
from contextlib import suppress


class Volume:
    """A folder for one ledger; ``fill`` leaves no room for another line, ``free`` gives it back."""

    def __init__(self, folder, size_mib=32):
        self.folder, self._filler = folder, folder / "filler"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0700", "tmpfs", str(folder)]
        self.is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
        self._limited = []

    def fill(self, *processes):
        """No write to the volume succeeds from here on; ``processes`` are those that write there."""
        if not self.is_mounted:
            for process in processes:
                # Files that exist may keep their size and not grow: a full disk as far as a ledger is concerned.
                resource.prlimit(process, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
                self._limited.append(process)
            return
        with self._filler.open("wb", buffering=0) as file:
            for piece in (1 << 20, 4096, 1):
                with suppress(OSError):  # no room for another piece of this size
                    while True:
                        file.write(b"\0" * piece)

    def free(self):
        self._filler.unlink(missing_ok=True)
        for process in self._limited:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        self._limited = []

    def close(self):
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True, capture_output=True)
