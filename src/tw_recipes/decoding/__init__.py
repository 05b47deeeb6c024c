"""Fork/join decoding: a state machine over engine calls, and engines behind one small protocol.

Names load on first use, so that importing this package loads neither transformers nor an HTTP client.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "GREEDY": "engine",
    "Call": "rollout",
    "Completion": "engine",
    "Engine": "engine",
    "EngineError": "engine",
    "Event": "rollout",
    "ForkJoinDecoder": "decoder",
    "Limits": "limits",
    "LockstepEngine": "lockstep_engine",
    "OpenAIEngine": "openai_engine",
    "Request": "engine",
    "Rollout": "rollout",
    "Sampling": "engine",
    "ScriptedEngine": "scripted_engine",
    "TransformersEngine": "transformers_engine",
    "VLLMEngine": "vllm_engine",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
