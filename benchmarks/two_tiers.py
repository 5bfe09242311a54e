"""What it costs to send embeddings to a Triton on another machine: `python -m benchmarks.two_tiers`.

CPU time, at both ends together, of the message of one prompt: with the embedding in it (SAM_TRITON_TRANSPORT=inline),
and with a reference to shared memory, as in a pod. Real gRPC over loopback, with a server in Python (Triton's is C++);
the model, which is the same for both, is left out.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from tritonclient.grpc import InferInput, service_pb2, service_pb2_grpc

EMBEDDINGS = {"sam-tiny": (1, 128, 24, 24), "ViT": (1, 256, 64, 64)}
MAX_BYTES = 64 << 20


class Taker(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc] # generated, untyped
    """Takes a request apart as a server does that needs the tensors' bytes, and answers nothing."""

    def ModelInfer(self, request: service_pb2.ModelInferRequest, _: object) -> service_pb2.ModelInferResponse:  # noqa: N802
        """Read every tensor."""
        for content in request.raw_input_contents:
            np.frombuffer(content, np.float16)
        return service_pb2.ModelInferResponse(model_name=request.model_name)


def request_with(embedding: np.ndarray, *, inline: bool) -> service_pb2.ModelInferRequest:
    """Return the request of a prompt, which holds the embedding (FP16) or says where it lies."""
    tensor = InferInput("embedding", list(embedding.shape), "FP16")
    if inline:
        tensor.set_data_from_numpy(embedding)
    else:
        tensor.set_shared_memory("arena", embedding.nbytes, 0)
    request = service_pb2.ModelInferRequest(model_name="sam_decoder", inputs=[tensor._get_tensor()])  # noqa: SLF001
    if inline:
        request.raw_input_contents.append(tensor._get_content())  # noqa: SLF001
    return request


def cpu_ms(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, embedding: np.ndarray, calls: int, *, inline: bool
) -> float:
    """Return the CPU time of one call, in ms: the median of ten times `calls`."""
    times = []
    for _ in range(10):
        started = time.process_time()
        for _ in range(calls):
            stub.ModelInfer(request_with(embedding, inline=inline))
        times.append((time.process_time() - started) / calls * 1e3)
    return statistics.median(times)


def main() -> None:
    """Serve, call, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.two_tiers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--calls", type=int, default=100, help="of each of ten rounds")
    arguments = parser.parse_args()
    options = [("grpc.max_receive_message_length", MAX_BYTES), ("grpc.max_send_message_length", MAX_BYTES)]
    server = grpc.server(ThreadPoolExecutor(1), options=options)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Taker(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print("| embedding | in the message | by reference |\n|---|---|---|")
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name, shape in EMBEDDINGS.items():
            embedding = np.zeros(shape, np.float16)
            inline, reference = (cpu_ms(stub, embedding, arguments.calls, inline=each) for each in (True, False))
            print(f"| {name}, {embedding.nbytes / 2**20:.2f} MiB | {inline:.2f} ms | {reference:.2f} ms |")
    server.stop(None)


if __name__ == "__main__":
    main()
