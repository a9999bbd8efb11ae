"""The reward for code that passes its unit tests, in a sandbox."""

from __future__ import annotations

import re

from equilibrium_mcore.config.rewards import CodeTestsConfig, reward_name
from equilibrium_mcore.verification.sandbox.cases import Case, CaseError, read_cases
from equilibrium_mcore.verification.sandbox.choose import choose_backend
from equilibrium_mcore.verification.sandbox.session import SandboxError, Session
from equilibrium_mcore.verification.scored import Example, Part, Verdict, shown

_FENCE = re.compile(r"^[ \t]*(?P<mark>```+|~~~+)[ \t]*(?P<language>[\w+-]*)[^\n]*\n", re.M)
_LANGUAGES = ("", "python", "python3", "py")
_REASONS = {
    "output": "more output than it may have",
    "memory": "more memory than it may have",
    "timeout": "more time than it may have",
}


class CodeTests:
    """1 where every test passes (or their share), else 0."""

    def __init__(self, config: CodeTestsConfig) -> None:
        """Raises NoSandboxError where code cannot be run safely, SandboxError for a library."""
        self.name = reward_name(config)
        self._config = config
        self._backend = choose_backend(config.sandbox.kind)
        if config.sandbox.libraries:
            self._try_libraries()
        self.notes = [f"{self.name}: code runs in the sandbox {self._backend.NAME}"]

    def _try_libraries(self) -> None:
        """Each must be there and readable inside: as root, the sandbox is another user."""
        for library in self._config.sandbox.libraries:
            if not library.is_dir():
                raise SandboxError(f"sandbox.libraries has {library}, which is no folder")
        with self._session("import os") as session:
            for library in self._config.sandbox.libraries:
                reply = session.ask({"expression": f"os.listdir({str(library.resolve())!r})"})
                if reply["status"] not in ("value", "output"):
                    raise SandboxError(
                        f"sandbox.libraries has {library}, which cannot be read inside "
                        f"({reply.get('reason')}): let all users read it (chmod -R a+rX)"
                    )

    def score(self, example: Example) -> Part:
        """Find the code, run it test by test."""
        try:
            cases = read_cases(example.truth)
        except CaseError as error:
            return Part(self.name, 0.0, "error", reason=shown(error))
        code = example.answer
        if code is None:
            code = find_code(
                example.text, fence=self._config.fence == "required", after=self._config.after
            )
        if code is None or not code.strip():
            return Part(self.name, 0.0, "unparsed", reason="no whole block of Python was found")
        try:
            passed, verdict, reason = self._run(code, cases)
        except SandboxError as error:
            return Part(self.name, 0.0, "error", reason=shown(error))
        value = passed / len(cases)
        if self._config.credit == "all":
            value = float(passed == len(cases))
        reason = f"{passed} of {len(cases)} tests passed{f'; {reason}' if reason else ''}"
        return Part(self.name, value, verdict, reason="" if verdict == "ok" else shown(reason))

    def _run(self, code: str, cases: list[Case]) -> tuple[int, Verdict, str]:
        """How many tests pass, the verdict, and the reason of the first that does not.

        When all must pass, the first failure ends it.
        """
        passed, verdict, reason = 0, "ok", ""
        session = None
        try:
            for number, case in enumerate(cases):
                session = session or self._session(code)
                reply = session.ask(case.request())
                failure = self._failure(case, reply)
                if failure is None:
                    passed += 1
                    continue
                if verdict == "ok":
                    verdict, reason = failure[0], f"test {number}: {failure[1]}"
                if self._config.credit == "all":
                    break
                if session.process.poll() is not None or reply["status"] in ("memory", "output"):
                    session.close()
                    session = None
        finally:
            if session is not None:
                session.close()
        return passed, verdict, reason

    def _session(self, code: str) -> Session:
        return Session(self._backend, self._config.sandbox, code, prelude=self._config.prelude)

    def _failure(self, case: Case, reply: dict) -> tuple[Verdict, str] | None:
        """None for a test that passed."""
        status = reply["status"]
        if status in ("value", "output_text"):
            tolerance = self._config.relative_tolerance
            if case.holds(reply.get("value"), relative_tolerance=tolerance):
                return None
            return "wrong", f"{case.expression or 'its output'} is not what it must be"
        verdict = "timeout" if status == "timeout" else "wrong"
        return verdict, str(reply.get("reason") or _REASONS.get(status, status))


def find_code(text: str, *, fence: bool = True, after: str | None = None) -> str | None:
    """The code of the last fenced block of Python; None without one, or where it is cut off.

    Without `fence` a text that has no block is code as a whole.
    """
    if after is not None:
        _, found, text = text.rpartition(after)
        if not found:
            return None
    code, place, seen = None, 0, False
    while opening := _FENCE.search(text, place):
        seen = True
        closing = re.compile(rf"^[ \t]*{re.escape(opening['mark'])}[ \t]*$", re.M)
        end = closing.search(text, opening.end())
        if opening["language"].lower() in _LANGUAGES:
            code = text[opening.end() : end.start()] if end else None
        if not end:
            break
        place = end.end()
    return code if seen or fence else text
