"""Pings find a frozen Triton; a healthy call that takes its time must outlive as many of them as it takes."""

import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from service.triton_link import PING_AFTER_S, channel_arguments
from tests.running import START_S, free_ports, triton_alone

PINGS = 6
MODEL = """
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep({seconds})
        return [pb_utils.InferenceResponse([], pb_utils.TritonError("slept well")) for _ in requests]
"""
CONFIG = """
name: "sam_encoder"
backend: "python"
max_batch_size: 1
input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""


def test_a_call_that_outlives_many_pings_is_answered(tmp_path: Path) -> None:
    """Nothing but pings travels meanwhile. A server that was not told closes the connection after the third."""
    version = tmp_path / "sam_encoder" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL.format(seconds=PINGS * PING_AFTER_S))
    (version.parent / "config.pbtxt").write_text(CONFIG)
    grpc_port, metrics_port = free_ports(2)
    address = f"127.0.0.1:{grpc_port}"
    with (
        triton_alone(address, str(metrics_port), tmp_path),
        closing(triton.InferenceServerClient(address, channel_args=channel_arguments())) as client,
    ):
        deadline = time.monotonic() + START_S
        while not is_ready(client):
            assert time.monotonic() < deadline, "Triton did not become ready"
            time.sleep(0.1)
        x = triton.InferInput("x", [1, 1], "FP32")
        x.set_data_from_numpy(np.zeros((1, 1), np.float32))
        with pytest.raises(triton.InferenceServerException, match="slept well"):
            client.infer("sam_encoder", [x], client_timeout=60)


def is_ready(client: triton.InferenceServerClient) -> bool:
    try:
        return bool(client.is_model_ready("sam_encoder", client_timeout=5))
    except triton.InferenceServerException:
        return False
