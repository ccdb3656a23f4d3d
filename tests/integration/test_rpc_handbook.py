"""docs/grpc.md says what happens: its Python runs as it stands, its grpcurl lines fit the protocol."""

import asyncio
import json
import re
import shlex
import sys
from pathlib import Path

from google.protobuf import json_format
from support.fleet import Backend
from support.gateway import REVISION, gateway_running, settings_for, working

from codeyard.producer.rpc import codeyard_pb2 as pb
from codeyard.shared.alias import Alias

PAGE = Path(__file__).parents[2] / "docs" / "grpc.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.S)
RUN_SECOND = """
async def twice() -> None:
    async with RpcClient("127.0.0.1:9090") as client:
        print(await infer(client, {"a": "def f(", "b": "def g("}))

import asyncio
asyncio.run(twice())
"""


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(PAGE.read_text()) if name == language]


async def test_the_python_of_the_page_runs_as_it_stands(embedded: Backend) -> None:
    """It is what people paste first."""
    first, second = blocks("python")
    settings = settings_for(embedded.broker_url, embedded.store_url, embedded.namespace, grpc_port=0)
    async with gateway_running(settings) as gateway:
        await gateway.store.swap_alias(None, Alias("starter", REVISION))
        async with working(gateway, "    return", " n\n"):
            said = [
                await _python(program.replace("127.0.0.1:9090", gateway.grpc))
                for program in (first, second + RUN_SECOND)
            ]

    assert said[0] == "    return n\nprompt_tokens=3 completion_tokens=2\n"
    assert said[1] == "{'a': b'    return n\\n', 'b': b'    return n\\n'}\n"


def test_the_lines_for_grpcurl_name_methods_there_are_and_send_what_they_take() -> None:
    """grpcurl reads `-d` as protobuf's JSON, which is read here the same way."""
    [shell] = blocks("sh")
    service = pb.DESCRIPTOR.services_by_name["Fleet"]
    tried = set()
    for line in shell.splitlines():
        words = shlex.split(line)
        if words[-1].startswith("codeyard.v1.Fleet/"):
            method = service.methods_by_name[words[-1].partition("/")[2]]
            body = words[words.index("-d") + 1]
            message = getattr(pb, method.input_type.name)()
            json_format.Parse(body, message)
            assert json.loads(body).keys() == {field.name for field, _ in message.ListFields()}
            tried.add(method.name)
        elif words[-2] == "describe":
            assert words[-1].rpartition(".")[2] in pb.DESCRIPTOR.message_types_by_name

    assert tried == {"Submit", "Get", "Stream", "StreamInference"}


async def _python(program: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", program),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()
