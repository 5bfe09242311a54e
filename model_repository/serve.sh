#!/bin/sh
# Starts Triton on engines in the folder $1 (default /models), after a check that they are whole and of this TensorRT.
# Further arguments go to tritonserver.
set -eu
repository="${1:-/models}"
[ "$#" -gt 0 ] && shift
python3 -m export.check_engines "$repository"
# Loopback only: the gateway is in the same pod. No HTTP: its parser is one more thing to attack. Client shared memory is
# how embeddings get from the encoder to the decoder without a message; Triton has it off by default from 2.69 on. The
# gateway pings (service/triton_link.py), to find a server that stands still: without these three flags Triton takes that
# for an attack and closes connections with healthy calls on them. With SAM_TRITON_SECRET, the gateway's, Triton does what
# could read or change memory and models only for who knows it.
if [ -n "${SAM_TRITON_SECRET:-}" ]; then
    restricted=shared-memory,model-config,model-repository,statistics,trace,logging
    set -- "--grpc-restricted-protocol=$restricted:sam-secret=$SAM_TRITON_SECRET" "$@"
fi
# Where a collector is named, as the gateway is told it: spans of what comes with a trace's context, and of nothing else
# (service/triton_link.py).
if [ -n "${OTEL_EXPORTER_OTLP_ENDPOINT:-}" ]; then
    set -- --trace-config=mode=opentelemetry \
        "--trace-config=opentelemetry,url=${OTEL_EXPORTER_OTLP_ENDPOINT%/}/v1/traces" \
        --trace-config=level=TIMESTAMPS --trace-config=rate=1000000000 "$@"
fi
exec tritonserver \
    --model-repository="$repository" \
    --disable-auto-complete-config \
    --allow-http=false \
    --grpc-address=127.0.0.1 --grpc-port=8001 \
    --metrics-address="${TRITON_METRICS_ADDRESS:-0.0.0.0}" --metrics-port=8002 \
    --grpc-http2-min-recv-ping-interval-without-data=500 \
    --grpc-http2-max-ping-strikes=0 \
    --grpc-keepalive-permit-without-calls=true \
    --allow-client-shm=true \
    --exit-timeout-secs=30 \
    "$@"
