"""Which sandbox works on this machine. None: code is not run, and the reasons are given."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType

from equilibrium_mcore.config.rewards import SandboxConfig
from equilibrium_mcore.verification.sandbox import bubblewrap, namespaces
from equilibrium_mcore.verification.sandbox.session import SandboxError, Session

BACKENDS: dict[str, ModuleType] = {
    bubblewrap.NAME: bubblewrap,
    namespaces.NAME: namespaces,
}
WAY_OUT = (
    "Code of a model is never run without one. Install bubblewrap (apt-get install bubblewrap, dnf "
    "install bubblewrap) and allow user namespaces (in a container: --security-opt "
    "seccomp=unconfined, or a profile that allows unshare and mount; on the host: "
    "user.max_user_namespaces above 0, and kernel.apparmor_restrict_unprivileged_userns=0 where "
    "there is that setting), or leave code_tests out"
)


class NoSandboxError(SandboxError):
    """No sandbox works here."""


def choose_backend(kind: str = "auto") -> ModuleType:
    """The sandbox of that kind, or the first that works. Raises NoSandboxError with the reasons."""
    names = list(BACKENDS) if kind == "auto" else [kind]
    reasons = []
    for name in names:
        reason = why_not(name)
        if not reason:
            return BACKENDS[name]
        reasons.append(reason)
    raise NoSandboxError(f"no sandbox works here: {'; '.join(reasons)}. {WAY_OUT}")


@cache
def why_not(name: str) -> str:
    """Why a sandbox does not work here; "" if it does: it was tried."""
    backend = BACKENDS[name]
    if sys.platform != "linux":
        return f"{name}: needs Linux, and this is {sys.platform}"
    if not backend.is_present():
        return backend.MISSING
    try:
        with Session(backend, SandboxConfig(), "def two():\n    return 2") as session:
            reply = session.ask({"expression": "two()"})
    except OSError as error:
        return f"{name}: {error}"
    return "" if reply.get("value") == ["int", "2"] else f"{name}: its trial gave {reply}"
