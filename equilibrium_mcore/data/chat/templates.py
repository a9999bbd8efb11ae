"""Chat templates as rows of one table: which control tokens and texts stand round a content.

A turn is: header, content, end, after. Control tokens go in by id. Every stretch of text between
two control tokens, and the content by itself, is encoded alone, so that no token reaches over the
border between a prompt and its answer: the ids of a prompt are the first ids of the whole.

The loss is on the content of an assistant's turn and on the end of that turn. What comes `after`
is written by the program and not by the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.data.chat.segments import ROLES
from equilibrium_mcore.data.chat.vocabulary import ChatVocabulary


@dataclass(frozen=True)
class Control:
    """A control token by its name; None is the tokenizer's end of document."""

    token: str | None


Parts = tuple[Control | str, ...]
END_OF_DOCUMENT = Control(None)


@dataclass(frozen=True)
class ChatTemplate:
    """A row: parts are control tokens and texts, in which `{role}` stands for the role's name.

    Attributes:
        begin: once, before the first turn.
        header: before a content.
        end: ends a turn; an assistant's is produced by the model.
        after: follows the end and is produced by nobody.
        roles: what `{role}` is for each role.
        trim: white space at both ends of a content is left out, as the published template does.
    """

    name: str
    header: Parts
    end: Parts
    begin: Parts = ()
    after: Parts = ()
    roles: Mapping[str, str] = field(default_factory=lambda: {role: role for role in ROLES})
    trim: bool = False

    @property
    def controls(self) -> list[str | None]:
        """The control tokens that it needs, each once; None is the end of document."""
        parts = (*self.begin, *self.header, *self.end, *self.after)
        return list(dict.fromkeys(part.token for part in parts if isinstance(part, Control)))

    @property
    def stop(self) -> str | None:
        """The control token that ends an answer."""
        return next(part.token for part in reversed(self.end) if isinstance(part, Control))


TEMPLATES: dict[str, ChatTemplate] = {
    template.name: template
    for template in (
        # OpenAI's ChatML, as Qwen writes it.
        ChatTemplate(
            "chatml",
            header=(Control("<|im_start|>"), "{role}\n"),
            end=(Control("<|im_end|>"),),
            after=("\n",),
        ),
        # Meta, Llama 3 model card and prompt formats; the tool's role there is ipython.
        ChatTemplate(
            "llama3",
            begin=(Control("<|begin_of_text|>"),),
            header=(
                Control("<|start_header_id|>"),
                "{role}",
                Control("<|end_header_id|>"),
                "\n\n",
            ),
            end=(Control("<|eot_id|>"),),
            roles={**{role: role for role in ROLES}, "tool": "ipython"},
            trim=True,
        ),
        # For every tokenizer: no control token but the end of document, which ends each turn.
        ChatTemplate(
            "plain",
            header=("{role}:\n",),
            end=(END_OF_DOCUMENT,),
            roles={role: role.capitalize() for role in ROLES},
        ),
    )
}


def missing_controls(template: ChatTemplate, vocabulary: ChatVocabulary) -> dict[str, str]:
    """Control tokens that the template needs and the tokenizer has not, each with what is wrong."""
    found = {token: vocabulary.problem_with(token) for token in template.controls}
    return {
        vocabulary.end_of_document if token is None else token: problem
        for token, problem in found.items()
        if problem is not None
    }


def check_controls(template: ChatTemplate, vocabulary: ChatVocabulary) -> None:
    """Raise ConfigError that names every control token that is missing, and the ways out."""
    missing = missing_controls(template, vocabulary)
    if not missing:
        return
    path, names = vocabulary.tokenizer.path, " ".join(f"'{token}'" for token in missing)
    fits = [n for n, row in TEMPLATES.items() if not missing_controls(row, vocabulary)]
    other = f", or take a template that it can write: {', '.join(fits)}" if fits else ""
    raise ConfigError(
        [
            f"template {template.name!r} needs the control token {token!r}, which {problem} "
            f"({path})"
            for token, problem in missing.items()
        ]
        + [
            f"add them to a copy of the tokenizer: {command('add-tokens')} {path} "
            f"--output NEW --tokens {names}{other}"
        ],
        source="the chat template",
    )
