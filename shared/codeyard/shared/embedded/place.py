"""Where the embedded file may lie: from a URL to a path on a local disk.

SQLite's write-ahead log shares memory between processes, so they must run on one machine, and its
locks must work: https://www.sqlite.org/wal.html. Network file systems promise neither.
"""

import os
from pathlib import Path

from codeyard.shared.errors import SettingsError

NETWORK_FILE_SYSTEMS = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb",
        "smb2",
        "smb3",
        "smbfs",
        "ncpfs",
        "afs",
        "ceph",
        "lustre",
        "gpfs",
        "beegfs",
        "glusterfs",
        "orangefs",
        "pvfs2",
        "gfs2",
        "ocfs2",
        "davfs",
        "fuse.sshfs",
        "fuse.glusterfs",
        "fuse.ceph",
        "fuse.ceph-fuse",
        "fuse.s3fs",
        "fuse.gcsfuse",
        "fuse.rclone",
        "fuse.juicefs",
        "fuse.goofys",
        "fuse.mount-s3",
        "fuse.blobfuse",
        "fuse.blobfuse2",
        "fuse.davfs",
    ]
)
_PREFIX = "sqlite:///"
_MOUNTS = Path("/proc/self/mountinfo")


def embedded_path(url: str) -> Path:
    """The file of `sqlite:///relative` or `sqlite:////absolute`, its folders made. Raises SettingsError."""
    name = url.removeprefix(_PREFIX)
    if name == url or not name or name.startswith(":memory:"):
        raise SettingsError(f"{url}: expected sqlite:///relative/path or sqlite:////absolute/path of a file")
    try:
        path = Path(name).expanduser().resolve()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are private
    except (OSError, RuntimeError) as error:
        raise SettingsError(f"{url}: its folder cannot be made: {error}") from None
    if path.is_dir():
        raise SettingsError(f"{url}: is a folder; name a file in it")
    _refuse_network(path)
    return path


def file_system(path: Path, mountinfo: str) -> str:
    """The type of the file system that holds an absolute path, from Linux's mountinfo; "" if unknown.

    Of several mounts at one point the last one listed is on top. Format: proc(5).
    """
    best, kind = "", ""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        point = fields[4].encode().decode("unicode_escape")  # blanks are written \040
        if len(point) >= len(best) and path.is_relative_to(point):
            best, kind = point, right.split()[0]
    return kind


def kind_of(path: Path) -> str:
    """The type of the file system that holds a path on this machine; "" if unknown."""
    try:
        return file_system(path.parent, os.fsdecode(_MOUNTS.read_bytes()))
    except OSError:
        return ""  # not Linux: the documentation has to do


def _refuse_network(path: Path) -> None:
    kind = kind_of(path)
    if kind in NETWORK_FILE_SYSTEMS:
        raise SettingsError(
            f"{path} is on a network file system ({kind}), where SQLite loses data; put it on a local disk "
            "(CODEYARD_BROKER_URL and CODEYARD_STORE_URL), or use RabbitMQ and Redis for several machines"
        )
