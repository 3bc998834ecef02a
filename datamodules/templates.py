"""Chat templates: how a conversation becomes text, and which part of it the model has to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from transformers.utils.chat_template_utils import render_jinja_template

from datamodules.records import MARKER, ImageOrder, Record, Turn, refusal

TemplateName = Literal["instruct", "plain"]
Message = dict[str, Any]

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
_PARTS = (
    "{% macro parts(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ image_token | default('<image>') }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
)
_INSTRUCT = (
    _PARTS + "{% set told = namespace(system=%SYSTEM%) %}"
    "{% if messages[0]['role'] == 'system' %}{% set told.system = parts(messages[0]['content']) %}{% endif %}"
    "{% if told.system %}{{ told.system + ' ' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + %USER%(message['content']) + ' ASSISTANT:' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + parts(message['content']) + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
_PLAIN = (
    _PARTS + "{% for message in messages %}{% if message['role'] == 'user' %}{{ %USER%(message['content']) }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ parts(message['content']) + '\\n' }}{% endgeneration %}{% endif %}{% endfor %}"
)
# In others' hands messages are theirs, so the template does to a turn's parts what `Template.question` does to ours: a
# line break after pictures that lead it, if there is none, or nothing but its pictures.
_LEADING = (
    "{% macro asked(content) %}{% if content is string %}{{ content }}{% else %}{% set turn = namespace(said=false) %}"
    "{% for part in content %}{% if part['type'] == 'image' %}{{ image_token | default('<image>') }}"
    "{% if not turn.said and not loop.last and (loop.nextitem['text'] | default('') | string)[:1] != '\\n' %}"
    "{{ '\\n' }}{% endif %}{% else %}{{ part['text'] }}"
    "{% if part['text'] | trim %}{% set turn.said = true %}{% endif %}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
_PICTURES = (
    "{% macro asked(content) %}{% if content is not string %}{% for part in content %}{% if part['type'] == 'image' %}"
    "{{ image_token | default('<image>') }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Args:
        text: The text, with the image token where a picture stands.
        answers: Where the parts that the model has to say begin and end, in characters.
        head: Characters before the first user's words.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    head: int


@dataclass(frozen=True)
class Template:
    """LLaVA-1.5's instruction template (vicuna v1), or its pre-training template.

    Args:
        name: ``instruct``: system sentence, ``USER:``, ``ASSISTANT:``, loss on answers and their end token. ``plain``:
            the picture followed by caption and line break, loss on both; the human's words are dropped.
        system: The system sentence of ``instruct``; empty for none.
        image_order: ``first`` puts the pictures of a turn before its words, as LLaVA does; ``as_written`` leaves them.
    """

    name: TemplateName = "instruct"
    system: str = VICUNA
    image_order: ImageOrder = "first"

    def __post_init__(self) -> None:
        if self.name not in ("instruct", "plain") or self.image_order not in ("first", "as_written"):
            raise ValueError(
                f"template={self.name!r} must be 'instruct' or 'plain', image_order={self.image_order!r} 'first' or"
                " 'as_written'."
            )

    @property
    def jinja(self) -> str:
        """The template in Hugging Face's language, with its ``generation`` blocks."""
        return self._written("parts")

    def exported(self, image_token: str) -> str:
        """The same for messages that others write, which may lack the line breaks that follow leading pictures."""
        macros = {("plain", "first"): _PICTURES, ("plain", "as_written"): _PICTURES, ("instruct", "first"): _LEADING}
        macro = macros.get((self.name, self.image_order), "")
        jinja = macro + self._written("asked" if macro else "parts")
        # Not every tokenizer tells its template what the image token is.
        return jinja.replace("image_token | default('<image>')", _quoted(image_token))

    def _written(self, user: str) -> str:
        jinja = {"plain": _PLAIN, "instruct": _INSTRUCT}[self.name].replace("%USER%", user)
        return jinja.replace("%SYSTEM%", _quoted(self.system))

    def conversation(self, record: Record) -> list[Message]:
        """The whole conversation, to learn from."""
        self._check(record)
        turns = [[self._user(record, turn), _message("assistant", turn.answer)] for turn in record.turns]
        return _system(record) + [message for turn in turns for message in turn]

    def question(self, record: Record, turn: int) -> list[Message]:
        """One question without the turns before it, but with their pictures."""
        self._check(record)
        before = sum(t.question.count(MARKER) for t in record.turns[:turn])
        asked = record.turns[turn]
        return [*_system(record), self._user(record, Turn(MARKER * before + asked.question, asked.answer))]

    def _check(self, record: Record) -> None:
        if self.name == "plain" and (len(record.turns), len(record.images)) != (1, 1):
            given = f"it has {len(record.images)} pictures and {len(record.turns)} answers"
            allowed = "the plain template takes one picture with one caption"
            raise refusal(record.where, given, allowed, "not a captioned picture", "Use template: instruct")

    def _user(self, record: Record, turn: Turn) -> Message:
        words = [part if self.name == "instruct" else "" for part in turn.question.split(MARKER)]
        if (record.image_order or self.image_order) == "first":
            start = "\n" if self.name == "instruct" else ""
            pictures = len(words) - 1
            words = [*[""] + [start] * pictures][: pictures + 1]
            words[-1] += "".join(turn.question.split(MARKER)).strip() if self.name == "instruct" else ""
        content: list[Message] = []
        for place, text in enumerate(words):
            content += [{"type": "image"}] * (place > 0) + [{"type": "text", "text": text}] * bool(text)
        return {"role": "user", "content": content}


def render(template: Template, messages: list[Message], special: Mapping[str, str]) -> Rendered:
    """The conversation as text; ``special`` names ``eos_token`` and ``image_token``."""
    (text,), (answers,) = render_jinja_template(
        conversations=[messages], chat_template=template.jinja, return_assistant_tokens_mask=True, **special
    )
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    told = system[0]["text"] if system else None
    return Rendered(text, tuple(map(tuple, answers)), _head(template, told, tuple(sorted(special.items()))))


@lru_cache
def _head(template: Template, system: str | None, special: tuple[tuple[str, str], ...]) -> int:
    mark = "\0"
    messages = ([] if system is None else [_message("system", system)]) + [_message("user", mark)]
    rendered, _ = render_jinja_template(
        conversations=[messages], chat_template=template.jinja, return_assistant_tokens_mask=True, **dict(special)
    )
    return rendered[0].rindex(mark)  # the system text may hold one too


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _system(record: Record) -> list[Message]:
    return [] if record.system is None else [_message("system", record.system)]


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}
