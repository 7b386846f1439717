"""A server on this machine, and a Hub on it."""

from __future__ import annotations

import hashlib
import json

import pytest

from tests.support.servers import serve


@pytest.fixture
def server(certificate):
    httpd = serve(certificate)
    yield httpd
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def hub(server, certificate, monkeypatch):
    """A Hub on this server: `hub(repo, files)` puts a repository there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("HF_TOKEN", "hf_test")

    def put(repo: str, files: dict[str, bytes]) -> None:
        tree = [
            {"type": "file", "path": name, "oid": "0" * 40, "size": len(content)}
            | {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}}
            for name, content in files.items()
        ]
        server.files[f"/api/datasets/{repo}/tree/main"] = json.dumps(tree).encode()
        server.plans[f"/api/datasets/{repo}/tree/main"] = ["plain"]
        for name, content in files.items():
            server.files[f"/datasets/{repo}/resolve/main/{name}"] = content

    return put
