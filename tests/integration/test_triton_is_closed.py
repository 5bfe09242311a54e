"""The local Triton: on loopback, without HTTP, and closed to all who do not know its secret, but for inference."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import tritonclient.grpc as triton

from service.triton_link import secret_headers
from tests.running import RunningService, descendants_of, free_settings

CALLS: dict[str, Callable[[triton.InferenceServerClient, dict[str, str]], object]] = {
    "shared-memory": lambda client, headers: client.register_system_shared_memory(
        "theirs", "/somebody", 64, headers=headers
    ),
    "shared-memory status": lambda client, headers: client.get_system_shared_memory_status(headers=headers),
    "model-config": lambda client, headers: client.get_model_config("sam_encoder", headers=headers),
    "model-repository": lambda client, headers: client.get_model_repository_index(headers=headers),
    "statistics": lambda client, headers: client.get_inference_statistics("sam_encoder", headers=headers),
    "trace": lambda client, headers: client.get_trace_settings(headers=headers),
    "logging": lambda client, headers: client.get_log_settings(headers=headers),
}


@pytest.fixture
def client(service: RunningService) -> Iterator[triton.InferenceServerClient]:
    with closing(triton.InferenceServerClient(service.settings["SAM_TRITON_URL"])) as opened:
        yield opened


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("headers", [{}, secret_headers("guessed")], ids=["nothing", "another secret"])
def test_what_could_read_memory_or_models_is_refused_without_the_secret(
    client: triton.InferenceServerClient, name: str, headers: dict[str, str]
) -> None:
    with pytest.raises(triton.InferenceServerException, match="restricted"):
        CALLS[name](client, headers)


def test_with_the_secret_the_same_calls_are_answered(
    client: triton.InferenceServerClient, service: RunningService
) -> None:
    headers = secret_headers(service.settings["SAM_TRITON_SECRET"])
    assert client.get_model_config("sam_encoder", headers=headers).config.name == "sam_encoder"
    assert service.arena_name in str(client.get_system_shared_memory_status(headers=headers))


def test_it_listens_on_loopback_only_and_to_two_ports(service: RunningService) -> None:
    ports = {int(service.settings["SAM_TRITON_METRICS_PORT"]), int(service.settings["SAM_TRITON_URL"].split(":")[1])}
    assert listening(service.triton_pid()) == {("0100007F", port) for port in ports}


def listening(pid: int) -> set[tuple[str, int]]:
    """Return addresses, as /proc/net/tcp writes them in IPv4, and ports that `pid` listens on."""
    links = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in links:
                address, _, port = local.partition(":")
                found.add((address.removeprefix("0000000000000000FFFF0000"), int(port, 16)))
    return found


def test_without_a_given_secret_one_is_made_that_is_new_at_every_start_and_in_no_log(tmp_path: Path) -> None:
    seen = set()
    for turn in range(2):
        settings = {**free_settings(), "SAM_TRITON_SECRET": "", "SAM_LOG_LEVEL": "debug"}
        with (tmp_path / str(turn)).open("w") as log, RunningService.launch(log=log, **settings) as service:
            service.wait_for("/readyz", 200)
            (worker,) = service.worker_pids()
            environment = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
            (secret,) = [line.partition(b"=")[2] for line in environment if line.startswith(b"SAM_TRITON_SECRET=")]
            assert len(secret) >= 32
            carriers = [
                pid
                for pid in (service.process.pid, *descendants_of(service.process.pid))
                if secret in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            assert carriers == [service.triton_pid()]  # Triton takes it no other way
            seen.add(secret)
        assert secret not in (tmp_path / str(turn)).read_bytes()
    assert len(seen) == 2
