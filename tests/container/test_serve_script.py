"""model_repository/serve.sh, which starts Triton in its image, starts the real one as the gateway needs it."""

import asyncio
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import tritonclient.grpc as triton

from service.triton_link import RESTRICTED, SECRET_NAME, ServerOptions, secret_headers
from service.triton_process import SHM, _environment, _known_flags, _lay_out_backend, find_installation
from tests import plain_http
from tests.running import ROOT, RunningService, free_settings

SCRIPT = ROOT / "model_repository" / "serve.sh"
SHM_PREFIX = "sam_serve_script_"


def written(path: Path, text: str) -> Path:
    """Write an executable file."""
    path.write_text(text)
    path.chmod(0o755)
    return path


def script_for(settings: dict[str, str]) -> str:
    """Return the script on other ports, and without the check of the engines, of which the CPU's models have none."""
    text = SCRIPT.read_text()
    port, metrics_port = settings["SAM_TRITON_URL"].rpartition(":")[2], settings["SAM_TRITON_METRICS_PORT"]
    changes = {
        'python3 -m export.check_engines "$repository"\n': "",
        "--grpc-port=8001": f"--grpc-port={port}",
        "--metrics-port=8002": f"--metrics-port={metrics_port}",
    }
    for before, after in changes.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    return text


def write_tritonserver(folder: Path) -> None:
    """Write a `tritonserver` that starts the wheel's, which lacks the image's backends and one of its flags."""
    installation = find_installation()
    _lay_out_backend(installation, folder / "backends" / "python")
    known = asyncio.run(_known_flags(installation))
    assert "grpc-restricted-protocol" in known
    unknown = "" if "allow-client-shm" in known else "--allow-client-shm=true"
    ours = f"--backend-directory={folder / 'backends'} --backend-config=python,shm-region-prefix-name={SHM_PREFIX}"
    lines = [
        "#!/bin/sh",
        f'for flag; do shift; [ "$flag" = "{unknown}" ] || set -- "$@" "$flag"; done',
        f"export LD_LIBRARY_PATH={shlex.quote(_environment(installation)['LD_LIBRARY_PATH'])}",
        f'exec {installation.binary} "$@" {ours} --allow-gpu-metrics=false --log-info=false',
    ]
    written(folder / "tritonserver", "\n".join(lines))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A gateway beside a Triton that the script started; both know the secret."""
    folder, settings = tmp_path_factory.mktemp("triton"), free_settings()
    write_tritonserver(folder)
    script = written(folder / "serve.sh", script_for(settings))
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SAM_TRITON_SECRET": settings["SAM_TRITON_SECRET"],
    }
    server = subprocess.Popen([script, ROOT / "model_repository" / "cpu"], env=environment, start_new_session=True)
    try:
        with RunningService.start(embedded=False, **settings) as running:
            yield running
    finally:
        server.terminate()
        assert server.wait(60) == 0
    assert not list(SHM.glob(f"{SHM_PREFIX}*"))


def test_the_gateway_answers_with_the_triton_it_starts(gateway: RunningService) -> None:
    """It is ready: its canary came back, through shared memory that it may register because it knows the secret."""
    assert plain_http.get(f"{gateway.url}/readyz").status_code == 200
    with closing(triton.InferenceServerClient(gateway.settings["SAM_TRITON_URL"])) as client:
        headers = secret_headers(gateway.settings["SAM_TRITON_SECRET"])
        assert gateway.arena_name in str(client.get_system_shared_memory_status(headers=headers))


@pytest.mark.parametrize("headers", [{}, secret_headers("guessed")], ids=["nothing", "another secret"])
def test_without_the_secret_triton_registers_no_memory(gateway: RunningService, headers: dict[str, str]) -> None:
    with closing(triton.InferenceServerClient(gateway.settings["SAM_TRITON_URL"])) as client:
        with pytest.raises(triton.InferenceServerException, match="restricted"):
            client.register_system_shared_memory("theirs", "/somebody", 64, headers=headers)
        with pytest.raises(triton.InferenceServerException, match="restricted"):
            client.get_model_repository_index(headers=headers)


def test_the_script_restricts_what_the_gateway_s_own_triton_does() -> None:
    text = SCRIPT.read_text()
    assert f"restricted={','.join(RESTRICTED)}\n" in text
    assert f"$restricted:{SECRET_NAME}=$SAM_TRITON_SECRET" in text


def test_the_script_has_triton_trace_what_the_gateway_s_own_triton_does() -> None:
    options = ServerOptions(Path(), Path(), "", "", 0, 0, traces_url="${OTEL_EXPORTER_OTLP_ENDPOINT%/}/v1/traces")
    text = SCRIPT.read_text()
    assert [each for each in options.tracing() if f"--trace-config={each}" not in text] == []
