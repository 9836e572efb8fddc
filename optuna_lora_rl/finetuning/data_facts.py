"""What was made of a study's data, and what evaluations read of it, as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from optuna_lora_rl.finetuning.workspace import Workspace


def facts(workspace: Workspace) -> dict[str, Any]:
    """Returns what :meth:`optuna_lora_rl.finetuning.finetuner.FineTuner.data_facts` tells."""
    prepared = workspace.prepared
    splits, tokens = prepared.splits, prepared.tokens
    known = {}
    for name, counts in splits.counts.items():
        emptied = tokens.emptied.get(name, 0)
        known[name] = {
            **asdict(counts),
            "used": counts.used - emptied,
            "emptied": emptied,
            "cut": tokens.cut.get(name, 0),
            "special": tokens.special.get(name, 0),
        }
    return {
        "kind": splits.kind,
        "learns": _learns(splits.kind, workspace.training.extra),
        "unread": list(splits.unread),
        "max_length": tokens.max_length,
        "answered": None if prepared.asked is None else len(prepared.asked.answers),
        "splits": known,
        "evaluations": workspace.rows_read,
        "evaluated": workspace.work.share(workspace.rows_read),
    }


def _learns(kind: str, extra: Mapping[str, Any]) -> str:
    """Which tokens of an example are learnt, as TRL decides it."""
    if extra.get("assistant_only_loss"):
        return "the assistant's turns"
    if kind == "messages":
        return "every turn, the user's among them"
    if kind == "prompt-completion" and extra.get("completion_only_loss") is not False:
        return "the completion"
    return "every token"
