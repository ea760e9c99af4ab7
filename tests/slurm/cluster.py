"""A SLURM of two virtual nodes on this machine, all of its own: keys, sockets, ports, state."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NODES = 2
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
LIMIT_S = 60

# Each virtual node believes that it has 4 cores, so that a job's processes need not wait for each
# other's. KillWait: what a job that is put back in line has, to save.
CONF = """\
ClusterName=vico
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
JobRequeue=1
KillWait=30
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 State=UP
"""


def lacking() -> str | None:
    """Why SLURM cannot run here, with what to do about it; None where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge (Debian, Ubuntu)"
    if os.geteuid() != 0:
        return "its daemons must be started by root: run as root, in a container for instance"
    return None


@dataclass(frozen=True)
class Cluster:
    """A running SLURM."""

    environment: dict[str, str]
    """What its commands need."""

    def ask(self, *words: str) -> str:
        """What a command of SLURM prints; its failure is the test's."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        text = self.ask("scontrol", "show", "job", number, "--oneliner")
        return dict(word.split("=", 1) for word in text.split() if "=" in word)


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Start munge, the controller and both nodes; end them, and the jobs, with the context."""
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, ports=_free_ports(3)))
    for name in ("state", "spool_n1", "spool_n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _search_path()}
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--{name}={folder}/munge.{name}" for name in ("socket",)]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
    commands = [munged, ["slurmctld", "-D", "-c"]]
    commands += [["slurmd", "-D", "-N", f"n{number + 1}"] for number in range(NODES)]
    daemons = []
    cluster = Cluster(environment)
    try:
        for command in commands:
            daemons.append(_started(command, folder, environment))
            if command is munged:
                wait_for((folder / "munge.socket").exists, "munge's socket", daemons)
        wait_for(lambda: _idle(cluster) == NODES, "both nodes to be idle", daemons)
        yield cluster
    finally:
        if len(daemons) == len(commands):
            subprocess.run(["scancel", "--full", "--user=root"], env=environment, check=False)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()


def wait_for(
    happened: Callable[[], bool],
    what: str,
    daemons: Sequence[subprocess.Popen[bytes]] = (),
    *,
    limit_s: float = LIMIT_S,
) -> None:
    """Ask until it is so; AssertionError when a daemon ends, or after the limit."""
    end = time.monotonic() + limit_s
    while not happened():
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        assert not ended, f"{ended} ended while waiting for {what}"
        assert time.monotonic() < end, f"waited {limit_s} s for {what}"
        time.sleep(0.1)


def _started(
    command: Sequence[str], folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    with open(folder / f"{'_'.join(command[::3])[:12]}.out".replace("/", ""), "ab") as output:
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def _idle(cluster: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--states=idle"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # A line a node and partition.
    return len({line.split()[0] for line in done.stdout.splitlines() if line.strip()})


def _search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(number: int) -> list[int]:
    """All bound at once, so that they differ."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
