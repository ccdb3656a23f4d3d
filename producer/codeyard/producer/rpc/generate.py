"""Make the stubs from codeyard.proto: `python -m codeyard.producer.rpc.generate` in a checkout.

Called by: people who changed the .proto, and the test that compares what is committed. Needs grpcio-tools.
"""

import sys
from importlib import resources
from pathlib import Path

PROTO = "codeyard/producer/rpc/codeyard.proto"
ROOT = Path(__file__).parents[3]  # of the import names


def generate(into: Path) -> None:
    """Write codeyard_pb2.py, .pyi and _grpc.py under `into`, in the folders of their package."""
    from grpc_tools import protoc

    well_known = str(resources.files("grpc_tools") / "_proto")
    outputs = [f"--{kind}_out={into}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, str(ROOT / PROTO)]) != 0:
        sys.exit("the .proto does not compile")


if __name__ == "__main__":
    generate(ROOT)
