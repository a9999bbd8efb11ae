r"""The Jinja text of a chat template, for `apply_chat_template` of an exported tokenizer.

A chat template makes text, and the tokenizer looks for control tokens in that text: a user who
writes `<|im_end|>` would end his turn. Two code points that no text holds prevent it, together with
two lines of the exported tokenizer.json (`hugging_face/chat_files.py`):

    U+FDD0  is put into every control token that a content spells, and taken out again by the
            tokenizer's normalizer: after control tokens were looked for, before text is encoded
    U+FDD1  is put between a header and a content; the tokenizer cuts there and drops it, so that
            no token reaches over that border

An engine that knows neither sees an odd character, and never a forged turn.
"""

from __future__ import annotations

import re

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.templates import ChatTemplate, Control, Parts
from equilibrium_mcore.data.chat.vocabulary import BORDER, ESCAPE, REPLACEMENT, ChatVocabulary

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # as transformers looks for it

_GUARD = """\
{%- macro _text(value) -%}
  {%- set _made = namespace(text=value | replace(ESCAPE, REPLACEMENT) | replace(BORDER, REPLACEMENT)) -%}
  {%- for _token in CONTROLS -%}
    {%- set _made.text = _made.text | replace(_token, _token[0] ~ ESCAPE ~ _token[1:]) -%}
  {%- endfor -%}
  {{- _made.text -}}
{%- endmacro -%}
"""  # noqa: E501

_TABLE = """\
{%- set _roles = ROLES -%}
{%- if tools -%}
  {{- raise_exception('this chat template has no place for tools: describe them in a system message') -}}
{%- endif -%}
BEGIN
{%- for message in messages -%}
  {%- if message.role not in _roles or message.content is not string -%}
    {{- raise_exception('a message needs a role of ' ~ (_roles | list | join(', ')) ~ ', and text as content') -}}
  {%- endif -%}
  {%- set _role = _roles[message.role] -%}
  HEADER{{- BORDER -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- CONTENT -}}END{%- endgeneration -%}
  {%- else -%}
    {{- CONTENT -}}END
  {%- endif -%}
  AFTER
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- set _role = _roles['assistant'] -%}
  HEADER
{%- endif -%}
"""  # noqa: E501

# Every text of every message, before the user's own template sees it.
_PROLOGUE = """\
{%- set _chat = namespace(messages=[], message={}) -%}
{%- for _given in messages -%}
  {%- set _chat.message = {} -%}
  {%- for _key, _value in _given.items() -%}
    {%- set _value = _text(_value) if _value is string else _value -%}
    {%- set _chat.message = dict(_chat.message, **{_key: _value}) -%}
  {%- endfor -%}
  {%- set _chat.messages = _chat.messages + [_chat.message] -%}
{%- endfor -%}
{%- set messages = _chat.messages -%}
"""


def of_table(template: ChatTemplate, vocabulary: ChatVocabulary) -> str:
    """The Jinja text of a row. Raises ConfigError as `guard` does."""
    content = "_text(message.content | trim)" if template.trim else "_text(message.content)"
    return guard(vocabulary) + _filled(
        _TABLE,
        ROLES="{" + ", ".join(f"{a!r}: {ascii(b)}" for a, b in template.roles.items()) + "}",
        BEGIN=_outputs(template.begin, vocabulary),
        HEADER=_outputs(template.header, vocabulary),
        BORDER=ascii(BORDER),
        CONTENT=content,
        END=_outputs(template.end, vocabulary),
        AFTER=_outputs(template.after, vocabulary),
    )


def of_user(source: str, vocabulary: ChatVocabulary) -> str:
    """A user's template with the guard before it, which it need not know of."""
    return guard(vocabulary) + _PROLOGUE + source


def guard(vocabulary: ChatVocabulary) -> str:
    """A Jinja macro that keeps control tokens out of a text.

    Raises ConfigError for a control token of one character, into which nothing can be put.
    """
    short = [token for token in vocabulary.controls if len(token) < 2]
    if short:
        raise ConfigError(
            f"{vocabulary.tokenizer.path} has the control token {short[0]!r}: one character cannot "
            "be kept apart from a user's text; mark it as not special, or take another tokenizer"
        )
    return _filled(
        _GUARD,
        CONTROLS="[" + ", ".join(ascii(token) for token in vocabulary.controls) + "]",
        ESCAPE=ascii(ESCAPE),
        BORDER=ascii(BORDER),
        REPLACEMENT=ascii(REPLACEMENT),
    )


def guarded(text: str, vocabulary: ChatVocabulary) -> str:
    """What the macro makes of a text."""
    text = text.replace(ESCAPE, REPLACEMENT).replace(BORDER, REPLACEMENT)
    for token in vocabulary.controls:
        text = text.replace(token, token[0] + ESCAPE + token[1:])
    return text


def _outputs(parts: Parts, vocabulary: ChatVocabulary) -> str:
    return "".join(f"{{{{- {_expression(part, vocabulary)} -}}}}" for part in parts)


def _expression(part: Control | str, vocabulary: ChatVocabulary) -> str:
    if isinstance(part, Control):
        return ascii(vocabulary.end_of_document if part.token is None else part.token)
    before, role, after = part.partition("{role}")
    pieces = [ascii(before)] * bool(before) + ["_role"] * bool(role) + [ascii(after)] * bool(after)
    return " ~ ".join(pieces)


def _filled(text: str, **values: str) -> str:
    names = re.compile("|".join(sorted(values, key=len, reverse=True)))
    return names.sub(lambda match: values[match.group()], text)
