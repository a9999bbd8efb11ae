"""What answers from a server need of the other settings."""

from __future__ import annotations

from collections.abc import Iterator

from equilibrium_mcore.config.pattern import count_kinds
from equilibrium_mcore.config.rule_kit import RuleTable, Subject

HTTP_ENGINE_RULES = RuleTable()
rule = HTTP_ENGINE_RULES.rule
SERVED_KINDS = ("attention", "mlp")
"""Layers of the families that serving engines have: Llama's and Qwen2's."""


@rule("rollout")
def an_http_engine_has_a_server(subject: Subject) -> Iterator[str]:
    rollout = subject.config.rollout
    if rollout.engine == "http" and rollout.http is None:
        yield (
            "rollout.engine='http' without rollout.http: say where the server is, e.g. "
            "rollout.http: {url: http://host:8000}, or set rollout.engine: own"
        )
    if rollout.engine != "http" and rollout.http is not None:
        yield (
            f"rollout.http with rollout.engine={rollout.engine!r}, which asks no server: set "
            "rollout.engine: http, or leave rollout.http out"
        )


@rule("rollout")
def a_server_has_an_address(subject: Subject) -> Iterator[str]:
    http = subject.config.rollout.http
    if http is not None and not http.url.startswith(("http://", "https://")):
        yield (
            f"rollout.http.url={http.url!r} is no address: give it with http:// or https://, e.g. "
            f"http://{http.url or 'host:8000'}"
        )


@rule("rollout", "model")
def a_server_has_the_family(subject: Subject) -> Iterator[str]:
    config = subject.config
    kinds = count_kinds(config.model.layer_pattern)
    others = sorted(kind for kind in kinds if kind not in SERVED_KINDS)
    if config.rollout.engine == "http" and others:
        yield (
            f"rollout.engine='http' with layers of {', '.join(others)}, which no serving engine "
            f"has in such a stack: it is for models of {' and '.join(SERVED_KINDS)} layers; set "
            "rollout.engine: own, which answers with the training modules in any layout"
        )


@rule("rollout")
def a_server_draws_from_all_tokens(subject: Subject) -> Iterator[str]:
    rollout = subject.config.rollout
    for name, all_of_them in (("top_k", 0), ("top_p", 1.0)):
        value = getattr(rollout, name)
        if rollout.engine == "http" and value != all_of_them:
            yield (
                f"rollout.{name}={value:g} with rollout.engine='http': a server does not say which "
                f"tokens could be drawn, so training could not score them; use {all_of_them:g}, or "
                "engine: own"
            )
