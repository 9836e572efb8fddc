from __future__ import annotations

import socket
from typing import Any

import pytest

from optuna_lora_rl.finetuning import hub


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach the Hugging Face Hub"), "no connection"),
        (OSError("We couldn't connect to 'https://huggingface.co'"), "no connection"),
        (OSError("401 Client Error. Access to model x is restricted: gated repo"), "is gated"),
        (OSError("x is not a valid model identifier"), "neither here nor on the hub"),
        (ValueError("Unknown split \"dev\". Should be one of ['train']."), "Unknown split"),
    ],
)
def test_hub_failures_say_what_is_wrong(error: Exception, words: str) -> None:
    assert words in hub.failure("model", "a/b", error)


def test_without_network_the_libraries_go_offline_for_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    from huggingface_hub import constants

    def refuse(*args: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with hub.no_waiting():
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_behind_a_proxy_the_libraries_try_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    with hub.no_waiting():
        assert not constants.HF_HUB_OFFLINE
