"""uvicorn has the methods and attributes that our connections override and use."""

from __future__ import annotations

import ast
import asyncio
import inspect
from typing import Any

import uvicorn
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from robustfeat.serving.http.process import connection


def source_class(name: str) -> ast.ClassDef:
    tree = ast.parse(inspect.getsource(connection))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def methods(node: ast.ClassDef) -> set[str]:
    return {entry.name for entry in node.body if isinstance(entry, (ast.FunctionDef, ast.AsyncFunctionDef))}


def attributes_of(node: ast.AST, owner: str) -> set[str]:
    """Names read from expressions that end in `owner`: `self`, or `cycle` for `cycle` and `self.cycle`."""
    found = set()
    for entry in ast.walk(node):
        if isinstance(entry, ast.Attribute):
            value = entry.value
            name = value.id if isinstance(value, ast.Name) else value.attr if isinstance(value, ast.Attribute) else ""
            if name == owner:
                found.add(entry.attr)
    return found


def require(names: set[str], given: Any, owner: str) -> None:
    missing = sorted(name for name in names if not hasattr(given, name))
    assert not missing, f"uvicorn {uvicorn.__version__}: {owner} has no {', '.join(missing)}; change http/process"


def test_uvicorn_has_the_internals_that_connections_use() -> None:
    async def make() -> tuple[Any, Any]:
        async def application(scope: Any, receive: Any, send: Any) -> None: ...

        config = uvicorn.Config(application, ws="none", lifespan="off", log_config=None)
        protocol = httptools_impl.HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
        protocol.on_message_begin()  # which makes `url`
        parameters = inspect.signature(httptools_impl.RequestResponseCycle).parameters
        return protocol, httptools_impl.RequestResponseCycle(**dict.fromkeys(parameters))  # type: ignore[arg-type]

    protocol, cycle = asyncio.run(make())
    own = source_class("Connection")
    overridden = {name for name in methods(own) if not name.startswith("_")}
    assert {"data_received", "on_headers_complete", "on_response_complete"} <= overridden
    require(overridden, httptools_impl.HttpToolsProtocol, "HttpToolsProtocol")
    defined = set(vars(connection.Connection)) | set(connection.Connection.__annotations__) | {"_cycles"}
    used = attributes_of(own, "self") - defined
    assert {"connections", "cycle", "flow", "pipeline", "transport", "timeout_keep_alive"} <= used
    require(used, protocol, "HttpToolsProtocol")
    require(attributes_of(own, "cycle"), cycle, "RequestResponseCycle")
    require(attributes_of(own, "flow"), FlowControl, "FlowControl")


def test_uvicorn_asks_the_server_for_its_signal_handling_and_its_end() -> None:
    overridden = {"capture_signals", "shutdown"}
    assert overridden == methods(source_class("Server")) - {"__init__"}
    require(overridden, uvicorn.Server, "Server")
    for name in overridden:
        assert name in inspect.getsource(uvicorn.Server.serve) + inspect.getsource(uvicorn.Server._serve), (
            f"uvicorn {uvicorn.__version__}: Server.serve does not call {name}; change http/process"
        )
    server = connection.Server(uvicorn.Config("none:app", ws="none", log_config=None), closed=lambda: None)
    used = attributes_of(source_class("Server"), "self")
    assert {"servers", "server_state", "_closed"} == used
    require(used - {"servers"}, server, "Server")
    assert "self.servers" in inspect.getsource(uvicorn.Server.startup)  # which makes it
    require({"connections"}, server.server_state, "ServerState")
