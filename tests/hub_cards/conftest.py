"""A Hub for the tests of pushing."""

import time

import huggingface_hub.constants
import pytest
from hub_server import WRITE_TOKEN, HubServer


@pytest.fixture
def hub(monkeypatch):
    """A running Hub, which this process may talk to although the tests run offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's pauses between its attempts
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it would keep the endpoint of the first test
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        yield server
