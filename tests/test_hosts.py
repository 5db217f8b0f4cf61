"""Training on two hosts: network namespaces with their own names, disks and SSH servers.

This needs root, iproute2, openssh-server and Open MPI: `.venv/bin/python -m pytest -m mpi`.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import test_mpi as mpi
from tests.conftest import Project
from tests.test_mpi import outputs, project, second

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin")
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(not shutil.which("ip"), reason="this needs Debian's iproute2"),
    pytest.mark.skipif(not SSHD, reason="this needs Debian's openssh-server"),
]
__all__ = ["project", "second"]  # fixtures

NAMES = (f"one{os.getpid()}", f"two{os.getpid()}")
ADDRESSES = ("10.0.0.1", "10.0.0.2")
SSHD_CONFIG = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
PidFile none
"""


def ip(command: str) -> str:
    return subprocess.check_output(["ip", *command.split()], text=True)


def on_host(name: str, prepare: str = "") -> tuple[str, ...]:
    """Return the start of a command that runs on a host, after the shell commands `prepare`."""
    script = f'hostname {name}; {prepare} exec "$@"'
    return ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-euc", script, "sh")


@dataclass
class Hosts:
    """Two hosts: the second has the disk of `second` at the path of `project`."""

    project: Project
    second: Project
    launcher: str

    def train(self) -> str:
        """Train on both hosts, started on the first. Return the output."""
        return mpi.train(self.project, self.launcher, on_host(NAMES[0]))

    def long_training(self) -> AbstractContextManager[Any]:
        """Start a long training on both hosts."""
        shutil.copy(self.project.root / "params.yaml", self.second.root)
        return mpi.long_training(self.project, self.launcher, on_host(NAMES[0]))

    def check_failure(self, pattern: str) -> None:
        mpi.check_failure(self.project, self.launcher, f"error: {pattern}", on_host(NAMES[0]))


@pytest.fixture
def hosts(project: Project, second: Project) -> Iterator[Hosts]:
    folder = project.root.parent
    for key in ("host", "user"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(keygen, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # normally the service creates it
    config = folder / "sshd_config"
    config.write_text(SSHD_CONFIG.format(folder=folder))
    (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    ssh = (
        f"-i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        " -o LogLevel=ERROR -o ServerAliveInterval=1 -o ServerAliveCountMax=2"
    )
    project.extra["PRTE_MCA_plm_ssh_args"] = ssh
    with ExitStack() as stack:
        for name in NAMES:
            ip(f"netns add {name}")
            stack.callback(ip, f"netns del {name}")
        ip(f"link add veth netns {NAMES[0]} type veth peer name veth netns {NAMES[1]}")
        disks = ("", f"mount --bind {second.root} {project.root};")
        for name, address, disk in zip(NAMES, ADDRESSES, disks, strict=True):
            ip(f"-n {name} addr add {address}/24 dev veth")
            for device in ("veth", "lo"):
                ip(f"-n {name} link set {device} up")
            command = [*on_host(name, disk), str(SSHD), "-D", "-f", str(config)]
            sshd = stack.enter_context(subprocess.Popen(command))
            stack.callback(sshd.terminate)
            wait = f"until ssh {ssh} {address} true; do sleep 0.1; done"
            subprocess.run([*on_host(name), "sh", "-c", wait], check=True, timeout=20)
        # Both hosts are the same machine, so do not bind the processes to the first core of each.
        mpirun = f"mpirun --timeout 60 --bind-to none --hostfile {folder}/hosts -np 2"
        yield Hosts(project, second, mpirun)


def processes_of_second_host() -> list[psutil.Process]:
    return [psutil.Process(int(pid)) for pid in ip(f"netns pids {NAMES[1]}").split()]


def test_two_hosts_give_the_same_bits(hosts: Hosts) -> None:
    mpi.train(hosts.project)
    expected = outputs(hosts.project)
    (hosts.project.root / "data/model.safetensors").unlink()
    before = hosts.second.results()
    hosts.train()
    assert outputs(hosts.project) == expected
    assert hosts.second.results() == before


def test_missing_file_names_its_host(hosts: Hosts) -> None:
    mpi.delete_data(hosts.second)
    hosts.check_failure(rf"data/train\.npz: not found; .*\(on {NAMES[1]}\)")


def test_other_code_names_both_hosts(hosts: Hosts) -> None:
    mpi.edit_code(hosts.second)
    hosts.check_failure(f"LAUNCHER: code or packages differs .*{NAMES[0]}.*{NAMES[1]}")


def test_dead_host_ends_all_and_the_rerun_resumes(hosts: Hosts) -> None:
    hosts.project.set(num_epochs=60)
    mpi.train(hosts.project)
    expected = outputs(hosts.project)
    with hosts.long_training():
        for process in processes_of_second_host():
            process.kill()
    mpi.check_no_process_is_left(hosts.project)
    assert "resumed" in mpi.train(hosts.project)
    assert outputs(hosts.project) == expected


def test_cut_network_ends_all(hosts: Hosts) -> None:
    hosts.project.set(num_epochs=1000)
    with hosts.long_training():
        ip(f"-n {NAMES[1]} link set veth down")
    ip(f"-n {NAMES[1]} link set veth up")  # then the processes of the second host end, too
    trainings = [each for each in processes_of_second_host() if "stages.train" in each.cmdline()]
    assert not psutil.wait_procs(trainings, timeout=30)[1]
