"""Facts about MPI that a process knows before it loads the library."""

import json
import os
import shlex
from collections.abc import Mapping
from contextlib import suppress

RETRY = 138  # exit code after a lost process: Kubernetes' training operators restart after 128 and more
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Environment variables in which launchers give the number of processes."""
RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
"""Environment variables in which launchers give a process its rank."""
LAUNCHED = "LAMA_LAUNCHED"  # set in processes that lama itself started: the options that start them again
MARK = "\x1elama "  # begins a line that a process writes for the command that started it
MISSING = "training by several processes needs mpi4py and an MPI library: pip install 'lama[mpi]'"


def launched() -> int:
    """The number of processes that a launcher such as mpiexec or srun has started; 1 without a launcher."""
    given = (os.environ.get(name, "") for name in SIZES)
    return max((int(n) for n in given if n.isdecimal()), default=1)


def follows() -> bool:
    """Whether this process is not the launcher's first one, which prints for all."""
    return launched() > 1 and any(os.environ.get(name, "0") != "0" for name in RANKS)


def launch_options() -> list[str]:
    """The options with which lama started this process and others, such as --processes 4; none otherwise."""
    return shlex.split(os.environ.get(LAUNCHED, ""))


def tell_launcher(about: Mapping[str, object]) -> None:
    """Tell the command that started this process, if that was lama, about the run."""
    if LAUNCHED in os.environ:
        with suppress(OSError):
            os.write(2, f"{MARK}{json.dumps(about)}\n".encode())
