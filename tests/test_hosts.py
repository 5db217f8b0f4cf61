"""Training on two hosts: network namespaces with names, disks and SSH servers of their own.

It takes root, iproute2, openssh-server and Open MPI: `.venv/bin/python -m pytest -m mpi`.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import Project, commit
from tests.test_distributed import (
    COMMAND,
    bits,
    check_end,
    check_no_process_is_left,
    project,
    train,
)

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/bin")
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root"),
    pytest.mark.skipif(not shutil.which("ip"), reason="this takes Debian's iproute2"),
    pytest.mark.skipif(not SSHD, reason="this takes Debian's openssh-server"),
]
__all__ = ["project"]  # a fixture


def ip(command: str) -> str:
    return subprocess.check_output(["ip", *command.split()], text=True)


@dataclass
class Hosts:
    """The first has the disk of `project`, the second that of `second` at the same path."""

    project: Project
    second: Project
    names: tuple[str, str]
    launcher: str

    def run(self, ok: bool = True) -> str:
        """Train on both, started on the first; return what is printed."""
        return Project(self.project.root, {**self.project.extra, "LAUNCHER": self.launcher}).run(
            *self.command(self.names[0]), *COMMAND, ok=ok
        )

    def start(self) -> "subprocess.Popen[str]":
        """Do so, and wait until it is on its way."""
        process = subprocess.Popen(
            [*self.command(self.names[0]), *COMMAND],
            cwd=self.project.root,
            env={**self.project.environment(), "LAUNCHER": self.launcher},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        while not (self.project.root / "data/checkpoint.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.01)
        return process

    @staticmethod
    def command(name: str, before: str = "") -> list[str]:
        script = f'hostname {name}; {before} exec "$@"'
        return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-euc", script, "sh"]

    def processes(self) -> list[psutil.Process]:
        """Those of the second host."""
        return [psutil.Process(int(pid)) for pid in ip(f"netns pids {self.names[1]}").split()]


@pytest.fixture
def hosts(project: Project) -> Iterator[Hosts]:
    commit(project, "Train on shards")
    folder = project.root.parent
    second = project.clone(folder / "second")
    for path in project.root.glob("data/*.npz"):
        shutil.copy(path, second.root / "data")
    for key in ("host", "user"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(keygen, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # as the service does
    config = folder / "sshd_config"
    config.write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\n"
        "PidFile none\n"
    )
    names = (f"one{os.getpid()}", f"two{os.getpid()}")
    addresses = ("10.0.0.1", "10.0.0.2")
    (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in addresses))
    ssh = (
        f"-i {folder}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        " -o LogLevel=ERROR -o ServerAliveInterval=1 -o ServerAliveCountMax=2"
    )
    # Both hosts are this one machine, so the processes must not be bound to the first core of each.
    project.extra["PRTE_MCA_plm_ssh_args"] = ssh
    launcher = f"mpirun --timeout 60 --bind-to none --hostfile {folder}/hosts -np 2"
    with ExitStack() as stack:
        for name in names:
            ip(f"netns add {name}")
            stack.callback(ip, f"netns del {name}")
        ip(f"link add veth netns {names[0]} type veth peer name veth netns {names[1]}")
        disks = ("", f"mount --bind {second.root} {project.root};")
        for name, address, disk in zip(names, addresses, disks, strict=True):
            ip(f"-n {name} addr add {address}/24 dev veth")
            for device in ("veth", "lo"):
                ip(f"-n {name} link set {device} up")
            command = [*Hosts.command(name, disk), str(SSHD), "-D", "-f", str(config)]
            sshd = stack.enter_context(subprocess.Popen(command))
            stack.callback(sshd.terminate)
            wait = f"until ssh -i {folder}/user {ssh} {address} true; do sleep 0.1; done"
            subprocess.run([*Hosts.command(name), "sh", "-c", wait], check=True, timeout=20)
        yield Hosts(project, second, names, launcher)


def test_two_hosts_give_the_same_bits(hosts: Hosts) -> None:
    train(hosts.project, "")
    expected = bits(hosts.project)
    (hosts.project.root / "data/model.safetensors").unlink()
    before = hosts.second.results()
    hosts.run()
    assert bits(hosts.project) == expected
    assert hosts.second.results() == before


def test_missing_file_names_its_host(hosts: Hosts) -> None:
    (hosts.second.root / "data/train.npz").unlink()
    pattern = rf"error: data/train\.npz: not found; .*\(on {hosts.names[1]}\)"
    check_end(hosts.project, hosts.run(ok=False), pattern)


def test_other_code_names_both_hosts(hosts: Hosts) -> None:
    with (hosts.second.root / "stages/train.py").open("a") as file:
        file.write("# a comment\n")
    first, second = hosts.names
    pattern = f"error: LAUNCHER: code or packages differs .*{first}.*{second}"
    check_end(hosts.project, hosts.run(ok=False), pattern)


def test_dead_host_ends_all_and_the_rerun_resumes(hosts: Hosts) -> None:
    hosts.project.set(num_epochs=60)
    shutil.copy(hosts.project.root / "params.yaml", hosts.second.root)
    train(hosts.project, "")
    expected = bits(hosts.project)
    process = hosts.start()
    for found in hosts.processes():
        found.kill()
    printed, _ = process.communicate()
    assert process.returncode
    assert "Traceback" not in printed
    check_no_process_is_left(hosts.project)
    assert "resumed" in train(hosts.project, "")
    assert bits(hosts.project) == expected


def test_cut_network_ends_all(hosts: Hosts) -> None:
    hosts.project.set(num_epochs=1000)
    shutil.copy(hosts.project.root / "params.yaml", hosts.second.root)
    process = hosts.start()
    ip(f"-n {hosts.names[1]} link set veth down")
    printed, _ = process.communicate()
    assert process.returncode, printed
    ip(f"-n {hosts.names[1]} link set veth up")  # and what is left on the other host ends, too
    trainings = [found for found in hosts.processes() if "stages.train" in found.cmdline()]
    assert not psutil.wait_procs(trainings, timeout=30)[1]
