"""gRPC: the service `codeyard.v1.Fleet` over the gateway's jobs, and a client for it.

`codeyard.proto` is the documentation of the protocol; `codeyard_pb2*` are generated from it and committed, so
that nobody needs a compiler (tests/unit/test_rpc_stubs.py holds them to it, `generate.py` makes them).

    asking, wire       messages from and to the types of codeyard.shared, for both sides
    refusals           our errors as gRPC statuses with metadata, and back
    server, inference  the service; needs the extras `gateway` and `grpc`
    calls, door        what all its calls have in common; who is let in
    serving            its process side: port, health, reflection, drain
    client, link       `RpcClient`, for programs elsewhere; needs the extra `grpc`

docs/grpc.md is the page. Nothing outside imports this package but gateway.serve, when `gateway.grpc_port` is set.
"""
