"""A network namespace of a command's own, in which the kernel counts what its processes send each other.

All its ports are free, and whatever was started inside ends with the thread that started the command, killed or not.
"""

import subprocess
from pathlib import Path

# a command alone with a loopback interface; a process namespace of its own ends as a whole
ALONE = (
    *("setpriv", "--pdeathsig", "KILL", "unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"),
    *("sh", "-c", 'ip link set lo up && exec "$@"', "sh"),
)


def refused() -> str:
    """Why no network namespace can be made here; "" where one can."""
    try:
        ran = subprocess.run([*ALONE, "true"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"no network namespace: {error}"
    return "" if ran.returncode == 0 else f"no network namespace: {ran.stderr.strip()}"


def received() -> int:
    """Bytes that the loopback interface has received since the namespace was made, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[0])
    raise RuntimeError("/proc/self/net/dev has no lo")
