"""A throw-away Slurm cluster on this machine: virtual nodes, fake GPUs, no systemd, no cgroups, loopback only.

Everything lies in one folder; only processes that this file started are ended.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from tests.waiting import processes, wait_for

DAEMONS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun")
PACKAGES = "munge slurmctld slurmd slurm-client"
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONF = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=15
StateSaveLocation={folder}/ctld
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=256
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,requeue_setup_env_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=300
SlurmctldTimeout=10
KillWait=2
MinJobAge=120
OverTimeLimit=0
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 RealMemory=4096 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no cluster here, None if there can."""
    absent = [name for name in DAEMONS if shutil.which(name, path=SEARCH) is None]
    return f"{', '.join(absent)} not installed; apt-get install {PACKAGES}" if absent else None


class Cluster:
    """`start()` it, use Slurm's commands with SLURM_CONF set to `.conf`, `stop()` it."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.nodes, self._mark = folder, nodes, ""
        self.conf = folder / "slurm.conf"
        self.env = os.environ | {"SLURM_CONF": str(self.conf), "PATH": SEARCH}

    def start(self) -> None:
        """Up in about a second; returns when every node is idle."""
        self._configure()
        self._run("mungekey", "--create", "--keyfile", str(self.folder / "munge/key"))
        files = {"socket": "munge.sock", "key-file": "munge/key", "pid-file": "munged.pid", "seed-file": "munge/seed"}
        self._run(
            "munged", *(f"--{k}={self.folder / v}" for k, v in files.items()), f"--log-file={self.folder}/munged.log"
        )
        self.start_controller()
        for node in range(1, self.nodes + 1):
            self.start_node(node)
        wait_for(
            "idle nodes", lambda: self.ask("sinfo", "-hNp", "main", "-o", "%T").split().count("idle") == self.nodes
        )

    def start_controller(self) -> None:
        """Start slurmctld, or start it again; jobs are kept on disk."""
        self._run("slurmctld")
        if self._mark:
            wait_for("the controller", lambda: self.ask("scontrol", "ping").count("UP"))
            self.ask("scancel", self._mark)

    def start_node(self, node: int) -> None:
        """Start the slurmd of a node, numbered from 1."""
        (self.folder / f"spool-n{node}").mkdir(exist_ok=True)
        self._run("slurmd", "-N", f"n{node}")

    def kill_controller(self) -> None:
        """kill -9 of slurmctld, once it has written down all jobs so far (it would use their numbers again)."""
        saved = self.folder / "ctld/job_state"
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        mark = self.ask("sbatch", "--parsable", "--hold", "--wrap", "true", "-o", "/dev/null").strip()
        wait_for("the controller to save its state", lambda: saved.exists() and saved.stat().st_mtime_ns > before)
        self.kill("slurmctld")
        self._mark = mark

    def kill(self, daemon: str) -> None:
        """kill -9 of `slurmctld` or `slurmd-n1`."""
        pid_file = self.folder / f"{daemon}.pid"
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        pid_file.unlink()

    def ask(self, *command: str) -> str:
        """What a Slurm command prints, empty when it fails."""
        done = subprocess.run(["timeout", "10", *command], env=self.env, capture_output=True, text=True, check=False)
        return done.stdout

    def reset(self) -> None:
        """No jobs, every node idle: what one test broke does not reach the next."""
        if not _alive(self.folder / "slurmctld.pid"):
            self.start_controller()
        if jobs := self.ask("squeue", "-h", "-o", "%A").split():
            self.ask("scancel", *set(jobs))
        for node in range(1, self.nodes + 1):
            if not _alive(self.folder / f"slurmd-n{node}.pid"):
                self.start_node(node)
        self.ask("scontrol", "update", "nodename=ALL", "state=resume")
        wait_for("no jobs", lambda: not self.ask("squeue", "-h", "-o", "%A").strip())
        wait_for("idle nodes", self._idle)

    def _idle(self) -> bool:
        return self.ask("sinfo", "-hNp", "main", "-o", "%T").split().count("idle") == self.nodes

    def notices_dead_nodes_after(self, seconds: int) -> None:
        """How long a node may be silent; short only while one is meant to die, for a busy machine is silent as well."""
        text = re.sub(r"SlurmdTimeout=\d+", f"SlurmdTimeout={seconds}", self.conf.read_text())
        self.conf.write_text(text)
        self._run("scontrol", "reconfigure")

    def kill_node(self, node: int) -> None:
        """kill -9 of a node: its daemon and everything that runs under it."""
        self.kill(f"slurmd-n{node}")
        ours = set(self._processes())
        for step in [pid for pid, line in processes("cmdline") if line[0].startswith(b"slurmstepd: [")]:
            below = _descendants(step)
            if ours & set(below):  # a step's own environment is overwritten by its title
                for pid in below:
                    _kill(pid)

    def stop(self) -> None:
        """End jobs, then daemons, then steps that outlived their daemon."""
        if jobs := self.ask("squeue", "-h", "-o", "%A").split():
            self.ask("scancel", "--full", *set(jobs))
            self.ask("scancel", "--signal=KILL", "--full", *set(jobs))
        for name in ("slurmctld", *(f"slurmd-n{n}" for n in range(1, self.nodes + 1)), "munged"):
            self._end(self.folder / f"{name}.pid")
        for pid in self._processes():
            _kill(pid)

    def _processes(self) -> list[int]:
        """What carries this cluster's SLURM_CONF, and is not this process."""
        mark = f"SLURM_CONF={self.conf}".encode()
        return [pid for pid, values in processes("environ") if mark in values and pid != os.getpid()]

    def _end(self, pid_file: Path) -> None:
        """Nothing of it is needed any more, so it is not asked."""
        if pid_file.exists():
            _kill(int(pid_file.read_text()))

    def _configure(self) -> None:
        for name in ("munge", "ctld"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge").chmod(0o700)
        (self.folder / "jobcomp.txt").touch()
        device = self.folder / "gpu"
        for number in range(2):  # Slurm wants a character device for each GPU before it counts it
            if os.getuid() == 0:
                os.mknod(f"{device}{number}", 0o020666, os.makedev(1, 3))
        files = f"{device}[0-1]" if os.getuid() == 0 else "/dev/tty[0-1]"
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{self.nodes}] Name=gpu File={files}\n")
        port = _free_ports(self.nodes + 1)
        names = {"host": socket.gethostname().split(".")[0], "user": os.environ.get("USER") or _user()}
        ports = {"port": port, "first": port + 1, "last": port + self.nodes}
        self.conf.write_text(CONF.format(folder=self.folder, nodes=self.nodes, **names, **ports))

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _alive(pid_file: Path) -> bool:
    return pid_file.exists() and not _gone(int(pid_file.read_text()))


def _descendants(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        below = []
    return [pid, *(d for child in below for d in _descendants(int(child)))]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody listens on."""
    for base in range(17000 + os.getpid() % 1000 * 10, 60000, count):
        taken = []
        for port in range(base, base + count):
            with socket.socket() as probe:
                taken.append(probe.connect_ex(("127.0.0.1", port)) == 0)
        if not any(taken):
            return base
    raise AssertionError("no free ports")
