"""An unmodified vLLM server as a process: started on a free port of 127.0.0.1, stopped by its pid.

The process leads a group of its own, so that its workers go with it; it is told to end if the test process dies.
"""

import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from tests.engines.models import CONTEXT

VENV = Path(os.environ.get("ENGINE_VENV", ".venv-engines")).absolute()
READY_WITHIN_S = float(os.environ.get("ENGINE_READY_S", "400"))
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "no_proxy": "127.0.0.1",
}
_PR_SET_PDEATHSIG = 1


def engine_python() -> Path:
    """The interpreter of the engines' virtual environment."""
    python = VENV / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{python} does not exist; run `make test-engines`, or set ENGINE_VENV")
    return python


def spawn(command: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """Starts a command in a process group of its own, its output in `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT, **environment},
            start_new_session=True,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
        )


def end(process: subprocess.Popen, *, kill: bool = False) -> None:
    """Ends a process and its group: politely, then not; or at once with `kill`."""
    if process.poll() is None and not kill:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            kill = True
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    deadline = time.monotonic() + 30
    while group_is_alive(process.pid):
        assert time.monotonic() < deadline, f"processes of group {process.pid} are left"
        time.sleep(0.05)


def group_is_alive(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class Server:
    """A vLLM server of one model folder; `start` again after `stop` or `kill` takes the same port."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log = folder, log
        self.url, self.model = f"http://127.0.0.1:{self.port}/v1", "model"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts the process; `wait` waits until it answers."""
        flags = {
            "--model": str(self.folder),
            "--served-model-name": self.model,
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--dtype": "float32",
            "--max-model-len": str(CONTEXT),
            "--max-num-seqs": "64",
            "--block-size": "32",
        }
        # The module, not the `vllm` script, which asks for package metadata that the CPU build has under another name.
        command = [str(engine_python()), "-m", "vllm.entrypoints.openai.api_server"]
        command += [word for flag in flags.items() for word in flag]
        self.process = spawn([*command, "--enforce-eager", "--enable-prompt-tokens-details"], self.log)

    def wait(self) -> None:
        """Waits until GET /health answers.

        Raises:
            RuntimeError: It ended or took too long; the message has the end of its log.
        """
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                pass
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"the server of {self.folder} ended before it was ready:\n{tail(self.log)}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server of {self.folder} is not ready in {READY_WITHIN_S} s:\n{tail(self.log)}")
            time.sleep(0.1)

    def stop(self, *, kill: bool = False) -> None:
        """Ends the process and everything it started."""
        process, self.process = self.process, None
        if process is not None:
            end(process, kill=kill)


def tail(log: Path, lines: int = 40) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
