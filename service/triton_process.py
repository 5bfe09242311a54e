"""A local tritonserver for embedded mode: found, started, awaited and ended. Development and tests; loopback only."""

import asyncio
import contextlib
import ctypes
import importlib.util
import logging
import os
import shutil
import signal
import site
import socket
import sys
import sysconfig
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from service.errors import StartError
from service.own_folder import OwnFolder, sweep
from service.triton_link import ServerOptions, flags_of

log = logging.getLogger(__name__)
triton_log = logging.getLogger("triton")

# What the wheel's server always says on a machine without a GPU, where it is meant to run.
HARMLESS = ("pinned_memory_manager.cc", "CudaDriverHelper has not been initialized")

MAX_LINE_BYTES = 1024 * 1024
# How long it may take to say which flags it knows. In ticks of our own, as a busy machine makes all slow.
FLAGS_TICKS, TICK_S = 60, 1.0
PR_SET_PDEATHSIG = 1
UTILITIES = "triton_python_backend_utils.py"
FOLDER_PREFIX = "sam-triton"
SHM_PREFIX = "sam_triton_"
SHM = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory


@dataclass(frozen=True, slots=True)
class Installation:
    """Where a tritonserver lies: the binary, its libraries (to be found first) and its Python backend."""

    binary: Path
    libraries: Path
    python_backend: Path
    stub: Path


def find_installation() -> Installation:
    """Find the server that the nvidia-pytriton wheel carries; only its binaries are used.

    Raises:
        StartError: it is not installed, or carries no Python backend for this interpreter.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise StartError("embedded mode needs tritonserver: pip install --no-deps nvidia-pytriton==0.7.0")
    package = Path(spec.origin).parent
    server = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise StartError(f"the installed tritonserver has no Python backend for Python {version}")
    return Installation(
        server / "bin" / "tritonserver", package.parent / "nvidia_pytriton.libs", server / "backends" / "python", stub
    )


class TritonProcess:
    """One tritonserver, owned by this process and ended with it, its shared memory included. It can be started again.

    Args:
        repository: Folder of the models to serve.
        grpc_address: "host:port" to listen on.
        metrics_port: Port of its own /metrics, same host.
        secret: What it asks for all but inference; "" for nothing. Its command line, which all users of the machine can
            read, holds it: Triton takes it no other way.
        traces_url: Where it sends its spans; "" for nowhere.
    """

    def __init__(
        self, repository: Path, grpc_address: str, metrics_port: int, secret: str = "", traces_url: str = ""
    ) -> None:
        self._repository = repository
        self._host, _, port = grpc_address.rpartition(":")
        self._port = int(port)
        self._metrics_port = metrics_port
        self._secret = secret
        self._traces_url = traces_url
        self._process: asyncio.subprocess.Process | None = None
        self._has_ended = False
        self._logging: asyncio.Task[None] | None = None
        self._folder: OwnFolder | None = None

    async def start(self) -> int:
        """Start the server and return its pid; it is not ready yet.

        Raises:
            StartError: no server, or one that says nothing; no such repository; or a port is taken.
        """
        installation = find_installation()
        if not (self._repository / "sam_encoder").is_dir():
            raise StartError(f"{self._repository} is no model repository; set SAM_MODEL_REPOSITORY")
        if not _is_loopback(self._host):
            raise StartError(
                f"embedded mode's Triton listens on loopback only, not on {self._host}: set SAM_TRITON_URL"
            )
        for port, setting in ((self._port, "SAM_TRITON_URL"), (self._metrics_port, "SAM_TRITON_METRICS_PORT")):
            _check_free(self._host, port, setting)
        arguments = self._options(self._laid_out(installation)).arguments(await _known_flags(installation))
        self._process = await asyncio.create_subprocess_exec(
            installation.binary,
            *arguments,
            env=_environment(installation),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=MAX_LINE_BYTES,
            start_new_session=True,  # a Ctrl-C is for the gateway, which ends Triton after its own requests
            preexec_fn=_die_with_parent,
        )
        self._has_ended = False
        self._logging = asyncio.create_task(_log_lines(self._process.stdout))
        return self._process.pid

    def _laid_out(self, installation: Installation) -> OwnFolder:
        """Return the folder of backends, made for the first start."""
        if self._folder is None:
            sweep(FOLDER_PREFIX, _forget_regions)
            self._folder = OwnFolder(FOLDER_PREFIX)
            _lay_out_backend(installation, self._folder.path / "python")
        return self._folder

    def _options(self, folder: OwnFolder) -> ServerOptions:
        return ServerOptions(
            repository=self._repository,
            backends=folder.path,
            shm_prefix=f"{SHM_PREFIX}{os.getpid()}_{folder.token}_",
            host=self._host,
            grpc_port=self._port,
            metrics_port=self._metrics_port,
            secret=self._secret,
            traces_url=self._traces_url,
        )

    async def wait(self) -> int:
        """Wait until the server ends, remove what is left of it, and return its exit code."""
        if self._process is None:
            raise RuntimeError("not started")
        code = await self._process.wait()
        if not self._has_ended:  # later the pid may be another's
            self._has_ended = True
            self._kill_group(self._process.pid)  # stubs outlive a server that was killed
        if self._logging is not None:
            await asyncio.wait([self._logging])  # not awaited itself: who is cancelled here must not cancel it
        if self._folder is not None:
            _forget_regions(self._folder.token)
        return code

    def kill(self) -> None:
        """End the server and its stubs at once, also stubs that outlive it: as long as they do, `wait` goes on.

        They hold the pipe with its output, and asyncio has a process end only with its pipes.
        """
        if self._process is not None and not self._has_ended:
            self._kill_group(self._process.pid)

    def _kill_group(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End the server at once, and remove what it left in shared memory.

        Its owner has nothing under way any more, and it keeps nothing: its own way out would only take three seconds.
        """
        if self._process is not None:
            self.kill()
            await self.wait()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None


def _forget_regions(token: str) -> None:
    """Remove the shared memory of a server whose folder has this token."""
    for region in SHM.glob(f"{SHM_PREFIX}*_{token}_*"):
        region.unlink(missing_ok=True)


async def _known_flags(installation: Installation) -> frozenset[str]:
    """Ask the server which flags it knows; that takes it some hundredths of a second.

    Raises:
        StartError: it does not say.
    """
    asked = await asyncio.create_subprocess_exec(
        installation.binary,
        "--help",
        env=_environment(installation),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    saying = asyncio.create_task(asked.communicate())
    try:
        for _ in range(FLAGS_TICKS):
            if (await asyncio.wait([saying], timeout=TICK_S))[0]:
                return flags_of(saying.result()[0].decode(errors="replace"))
    finally:
        saying.cancel()
        if asked.returncode is None:
            asked.kill()
            await asked.wait()
    raise StartError(f"{installation.binary.name} --help says nothing within {FLAGS_TICKS * TICK_S:g} s")


async def _log_lines(lines: asyncio.StreamReader | None) -> None:
    """Pass the server's words on to our log, until it ends."""
    while lines is not None and (raw := await _next_line(lines)):
        line = raw.decode(errors="replace").rstrip()
        if line and not any(words in line for words in HARMLESS):
            triton_log.log(logging.WARNING if line.startswith(("W", "E", "F")) else logging.DEBUG, "%s", line)


async def _next_line(lines: asyncio.StreamReader) -> bytes:
    try:
        return await lines.readline()
    except ValueError:  # longer than MAX_LINE_BYTES; what of it was read is dropped
        return b"(a line too long to show)\n"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False


def _check_free(host: str, port: int, setting: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(f"Triton cannot listen on {host}:{port}; set {setting} to a free port") from error


def _lay_out_backend(installation: Installation, folder: Path) -> None:
    """Put library, utilities and the stub of this Python side by side, as Triton wants them.

    The stub ignores PYTHONPATH, and its utilities, the first thing it imports, need numpy: they are told where it lies.
    """
    folder.mkdir(parents=True)
    for file in installation.python_backend.iterdir():
        if file.name == UTILITIES:
            site_packages = f"import sys; sys.path += {site.getsitepackages()!r}\n"
            (folder / file.name).write_text(site_packages + file.read_text())
        else:
            (folder / file.name).symlink_to(file)
    stub = folder / installation.stub.name
    shutil.copyfile(installation.stub, stub)
    stub.chmod(0o755)


def _environment(installation: Installation) -> dict[str, str]:
    libraries = [str(installation.libraries), sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
    }


def _die_with_parent() -> None:
    """In the child: get SIGTERM when the gateway dies, however it dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
