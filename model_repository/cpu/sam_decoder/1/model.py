"""Serves one ONNX graph through Triton's Python backend and ONNX Runtime: images a batch at once, prompts in parts.

Copied into every model of model_repository/cpu/ by `python -m export repository`; edit export/templates/model.py.
numpy and onnxruntime must be importable by the Python that Triton's backend runs.
"""

import ctypes
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # isort: skip # first: where packages lie may be told there

import numpy as np
import onnxruntime as ort

# At this many prompts a run, one costs a core the least: fewer share too little, what more compute leaves its caches.
MAX_PROMPTS_PER_RUN = 8
MAX_PROMPTS = 64  # at once on all cores together, so that memory stays bounded
# A prompt on a smaller grid of embeddings takes one core: two threads cost it half as much again and end no sooner.
LARGE_GRID = 32


def cpu_limit() -> int:
    """CPUs this process may use: the smaller of its affinity and its cgroup's quota (v2, then v1), at least 1."""
    available = len(os.sched_getaffinity(0))
    for quota_path, period_path in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            words = Path(quota_path).read_text().split()
            period = words[1] if period_path is None else Path(period_path).read_text()
            quota_us, period_us = float(words[0]), float(period)
        except (OSError, ValueError, IndexError):
            continue  # no such cgroup, or no quota ("max")
        if quota_us > 0:
            return max(1, min(available, math.ceil(quota_us / period_us)))
    return max(1, available)


def dlpack_capsule(array: Any) -> Any:  # noqa: ANN401 - whatever has __dlpack__
    """Return `array` as a DLPack capsule that Triton's stub can take over.

    Handed the array itself, a stub built against numpy 1 reads a numpy 2 array's item size as 0 and answers with no
    bytes. It also renames a capsule it has taken to something numpy's destructor does not know and complains about on
    every call, hence no destructor: the taken tensor's own deleter frees the array.
    """
    capsule = array.__dlpack__()
    set_destructor = ctypes.pythonapi.PyCapsule_SetDestructor
    set_destructor.argtypes = [ctypes.py_object, ctypes.c_void_p]
    set_destructor(capsule, None)
    return capsule


def session_on(path: Path, threads: int) -> Any:  # noqa: ANN401 - ONNX Runtime has no types
    """Open a graph that computes on so many threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads double the latency as soon as something else wants the CPU (the gateway does).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # ONNX Runtime's fused CPU kernel for residual + LayerNorm is slower than the two it replaces.
    return ort.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
    )


class TritonPythonModel:
    """One model instance; Triton calls `initialize` once and `execute` with every dynamic batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load model.onnx beside this file. `args` is the backend's: JSON model_config, repository folder, version."""
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.by_prompt = [tensor["name"] for tensor in config["input"] if int(tensor["dims"][0]) < 0]
        self.cores = min(cpu_limit(), MAX_PROMPTS)
        self.pool = ThreadPoolExecutor(self.cores)
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        is_small = bool(self.by_prompt) and int(config["input"][0]["dims"][-1]) < LARGE_GRID
        self.on_all_cores: Any = None if is_small else session_on(path, self.cores)
        self.on_one_core: Any = session_on(path, 1) if self.by_prompt else None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request; a request that fails alone does not fail the others of its batch."""
        answers: list[Any] = [None] * len(requests)
        feeds: list[tuple[int, dict[str, Any]]] = []
        for index, request in enumerate(requests):
            if request.is_cancelled():
                error = pb_utils.TritonError("the request was cancelled", pb_utils.TritonError.CANCELLED)
                answers[index] = pb_utils.InferenceResponse([], error)
            else:
                feeds.append((index, self._feed(request)))
        try:
            results = self._run([feed for _, feed in feeds]) if feeds else []
        except Exception:  # noqa: BLE001 - whichever request it was: they are tried one by one
            for index, feed in feeds:
                answers[index] = self._answer(feed)
        else:
            for (index, _), result in zip(feeds, results, strict=True):
                answers[index] = self._response(result)
        return answers

    def _feed(self, request: Any) -> dict[str, Any]:  # noqa: ANN401 - Triton's types exist only inside Triton
        # Not as_numpy(): from a stub built against numpy 1 it comes with strides of 0 under numpy 2, every element the
        # first one.
        tensors = ((name, pb_utils.get_input_tensor_by_name(request, name)) for name in self.inputs)
        return {name: np.from_dlpack(tensor) for name, tensor in tensors}

    def _run(self, feeds: list[dict[str, Any]]) -> list[list[Any]]:
        """Run all feeds, stacked on the image axis (Triton merges only equal shapes), and split the outputs again."""
        counts = [len(feed[self.inputs[0]]) for feed in feeds]
        stacked = {
            name: feeds[0][name] if len(feeds) == 1 else np.concatenate([feed[name] for feed in feeds])
            for name in self.inputs
        }
        outputs = self._run_prompts(stacked) if self.by_prompt else self.on_all_cores.run(self.outputs, stacked)
        ends = np.cumsum(counts)
        return [[output[end - count : end] for output in outputs] for count, end in zip(counts, ends, strict=True)]

    def _run_prompts(self, stacked: dict[str, Any]) -> list[Any]:
        """Run all prompts of all images, in parts: one to a core at a time. Of a large graph, few take all cores."""
        shapes = {stacked[name].shape[:2] for name in self.by_prompt}
        if len(shapes) > 1:
            raise ValueError(f"{', '.join(self.by_prompt)} are of different numbers of prompts")
        images, prompts = shapes.pop()
        if self.on_all_cores and images * prompts < self.cores:
            return list(self.on_all_cores.run(self.outputs, stacked))
        at_once = min(MAX_PROMPTS_PER_RUN, MAX_PROMPTS // self.cores, math.ceil(images * prompts / self.cores))
        images_at_once, prompts_at_once = max(1, at_once // prompts), min(at_once, prompts)
        parts = [
            (slice(image, image + images_at_once), slice(prompt, prompt + prompts_at_once))
            for image in range(0, images, images_at_once)
            for prompt in range(0, prompts, prompts_at_once)
        ]
        if len(parts) == 1:
            return self._run_part(stacked, parts[0])
        results = list(self.pool.map(self._run_part, repeat(stacked), parts))
        outputs = [np.empty((images, prompts, *output.shape[2:]), output.dtype) for output in results[0]]
        for part, result in zip(parts, results, strict=True):
            for output, of_part in zip(outputs, result, strict=True):
                output[part] = of_part
        return outputs

    def _run_part(self, stacked: dict[str, Any], part: tuple[slice, slice]) -> list[Any]:
        feed = {name: array[part if name in self.by_prompt else part[0]] for name, array in stacked.items()}
        return list(self.on_one_core.run(self.outputs, feed))

    def _answer(self, feed: dict[str, Any]) -> Any:  # noqa: ANN401
        try:
            return self._response(self._run([feed])[0])
        except Exception as error:  # noqa: BLE001 - the one place where a graph's failure becomes an answer
            return pb_utils.InferenceResponse([], pb_utils.TritonError(f"inference failed: {error}"))

    def _response(self, outputs: list[Any]) -> Any:  # noqa: ANN401
        tensors = [
            pb_utils.Tensor.from_dlpack(name, dlpack_capsule(np.ascontiguousarray(output)))
            for name, output in zip(self.outputs, outputs, strict=True)
        ]
        return pb_utils.InferenceResponse(tensors)
