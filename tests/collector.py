"""An OTLP collector for tests, and what its spans say."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest


class Collector:
    """An OTLP collector over gRPC that keeps the names and attributes of the spans it is sent."""

    def __init__(self):
        grpc = pytest.importorskip("grpc")
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

        self._answer = trace_service_pb2.ExportTraceServiceResponse
        self.spans = []
        self._server = grpc.server(ThreadPoolExecutor(1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request, context):  # noqa: N802 - the protocol's name
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += [(scope.scope.name, span) for span in scope.spans]
        return self._answer()

    def close(self):
        self._server.stop(0).wait()

    def wait_for(self, name, trace_id, patience_s=30.0):
        """Return the span of this name in a client's trace."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            for _, span in list(self.spans):
                if span.name == name and span.trace_id.hex() == trace_id:
                    return span
            time.sleep(0.1)
        pytest.fail(f"no span {name!r}: {[(scope, span.name) for scope, span in self.spans]}")


def attributes(span):
    """Return what a span says of a request, without the prefix of ours."""
    said = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}
    return {name.removeprefix("slos_serve."): value for name, value in said.items()}
