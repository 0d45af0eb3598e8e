"""A real SSH server on loopback, and an `ssh` that reaches it where a page says only `ssh HOST`."""

import getpass
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from job_runs import wait_for
from loopback import listens

SERVER = "/usr/sbin/sshd"
MISSING = "apt-get install openssh-server rsync"


def has_ssh() -> bool:
    """Whether this machine has all that it takes."""
    return Path(SERVER).is_file() and all(map(shutil.which, ("ssh", "ssh-keygen", "rsync")))


@contextmanager
def ssh_server(home: Path, port: int, environment: Mapping[str, str]) -> Iterator[None]:
    """Let `~/.ssh/id_ed25519` of a home in, whose logins have an environment and a `~/.bashrc`.

    `home/bin/ssh` goes to `port` whatever host it is told.
    """
    keys = home / ".ssh"
    keys.mkdir(mode=0o700)
    for name in ("id_ed25519", "host"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True
        )
    (home / ".bashrc").write_text(f"export PATH={environment['PATH']}\n")
    setting = " ".join(f'"{name}={value}"' for name, value in environment.items())
    (keys / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys}/host\nPidFile none\n"
        f"AuthorizedKeysFile {keys}/id_ed25519.pub\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nPermitRootLogin prohibit-password\nSetEnv {setting}\n"
    )
    program = home / "bin/ssh"
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -p {port} -i {keys}/id_ed25519"
        " -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        f' -l {getpass.getuser()} "$@"\n'
    )
    program.chmod(0o755)
    if os.geteuid() == 0:  # the folder that Debian's own start script makes
        Path("/run/sshd").mkdir(exist_ok=True)
    log = (keys / "log").open("w")
    server = subprocess.Popen([SERVER, "-D", "-e", "-f", str(keys / "sshd_config")], stderr=log)
    try:
        wait_for(lambda: listens(port) or server.poll() is not None, seconds=20)
        assert server.poll() is None, (keys / "log").read_text()
        yield
    finally:
        server.kill()
        server.wait()
        log.close()
