"""Files, here or elsewhere: a path, or a URL (gs:// s3:// memory:// https:// ...) that fsspec reads.

Local paths are read with os.pread; nothing is kept open between reads, so that thousands of shards fit
in a process's open files and a source can be sent to another process.
"""

import glob
import hashlib
import os
import posixpath
import stat
import tempfile

import fsspec

from mmgen.data.images import BadImage

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}  # protocol -> the extra of mmgen that reads it


def is_remote(path):
    return "://" in path


def join(folder, name):
    """`name` as a file in `folder` writes it: relative to the folder, absolute, or a URL."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return posixpath.join(folder, name) if is_remote(folder) else os.path.join(folder, name)


def expand(pattern):
    """The files that a path or glob (`**` crosses folders) names -> {path: bytes}, sorted by path."""
    if is_remote(pattern):
        system, path = _remote(pattern)
        return _sized(system, system.glob(path, detail=True))
    pattern = os.path.expanduser(pattern)
    # A name that exists is meant as it stands, brackets and all.
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    return {path: os.path.getsize(path) for path in sorted(paths) if os.path.isfile(path)}


def walk(folder):
    """Every file under a folder -> {path: bytes}, sorted by path, but those whose names begin with a dot."""
    if is_remote(folder):
        system, path = _remote(folder)
        found = _sized(system, system.find(path, detail=True))
        below = len(normal(folder))
        return {name: size for name, size in found.items() if "/." not in name[below:]}
    folder, found = os.path.expanduser(folder), {}
    for root, folders, names in os.walk(folder, onerror=_fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(root, name) for name in names if not name.startswith(".")):
            if os.path.isfile(path):
                found[path] = os.path.getsize(path)
    return dict(sorted(found.items()))


def open_file(path):
    """Opens for reading from start to end."""
    if not is_remote(path):
        return open(path, "rb")
    system, path = _remote(path)
    return system.open(path, "rb")


def normal(path):
    """The one way in which `expand` and `walk` write a path."""
    if not is_remote(path):
        return os.path.expanduser(path)
    system, path = _remote(path)
    return system.unstrip_protocol(path)


def read(path, start=0, count=None, limit=None):
    """Bytes [start, start + count) of a file, to its end without `count`; fewer where it is shorter.

    Raises BadImage: no_file, too_many_bytes (more than `limit`), not_read.
    """
    try:
        if is_remote(path):
            system, inside = _remote(path)
            _check(path, count or 0, limit)
            # To ask for the size would be another request: one byte too many tells as much.
            most = count if count is not None else None if limit is None else limit + 1
            data = system.cat_file(inside, start=start, end=None if most is None else start + most)
            _check(path, len(data), limit)
            return data
        # Not blocking: a named pipe in a folder must not stop the run.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not_read", f"{path} is not a regular file")
            count = status.st_size - start if count is None else count
            _check(path, count, limit)
            return os.pread(file, count, start)
        finally:
            os.close(file)
    except BadImage:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadImage("no_file", f"no such file: {path}") from error
    except Exception as error:  # a network has many ways to fail, each library its own
        raise BadImage("not_read", f"{path}: {type(error).__name__}: {error}") from error


def write(path, data):
    """Writes bytes to a file, which is whole or not there."""
    if is_remote(path):  # where a file appears when it is closed
        system, path = _remote(path)
        return system.pipe_file(path, data)
    with open(f"{path}.tmp", "wb") as file:
        file.write(data)
    os.replace(f"{path}.tmp", path)


def local(path):
    """A local path with the contents of `path`: itself, or a copy in the temporary folder, made once.

    For readers that know no other files. Copies are kept until the machine clears its temporary folder.
    """
    if not is_remote(path):
        return path
    system, inside = _remote(path)
    folder = os.path.join(tempfile.gettempdir(), f"mmgen-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder).st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    info = system.info(inside)
    state = [path, info["size"], *(str(info.get(key)) for key in ("etag", "ETag", "mtime", "created"))]
    name = hashlib.sha256(repr(state).encode()).hexdigest()[:32]
    copy = os.path.join(folder, name)
    if not os.path.exists(copy):
        handle, unfinished = tempfile.mkstemp(dir=folder)
        os.close(handle)
        system.get_file(inside, unfinished)
        os.replace(unfinished, copy)
    return copy


def relative_names(paths):
    """Paths without the folder that they have in common: the same on every machine."""
    shared = os.path.commonprefix(list(paths)).rfind("/") + 1
    return [path[shared:] for path in paths]


def _fail(error):
    raise error


def _check(path, count, limit):
    if limit is not None and count > limit:
        raise BadImage("too_many_bytes", f"{path}: {count} bytes, at most {limit} are read")


def _remote(url):
    """-> (file system, path inside it). Both are cached by fsspec, for each process and thread."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        protocol = url.partition("://")[0]
        extra = EXTRAS.get(protocol)
        hint = f"pip install 'mmgen[{extra}]'" if extra else str(error)
        raise ImportError(f"{protocol}:// needs a package that is not installed: {hint}") from error


def _sized(system, found):
    sizes = {system.unstrip_protocol(path): info for path, info in found.items() if info["type"] == "file"}
    return {path: sizes[path]["size"] for path in sorted(sizes)}
