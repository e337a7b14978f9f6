"""A row as the model is shown it: the checkpoint's template decides, and words can pass for nothing else."""

import json
import resource
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from mdl_toolkit.data import chat_template
from mdl_toolkit.data.chat_template import AudioMarks, ChatTemplate, Message, Span, messages_of
from mdl_toolkit.data.manifest import Row
from mdl_toolkit.errors import ModelError
from tests.support.paths import GOLDEN

PUBLISHED = (GOLDEN / "checkpoints/A-small/chat_template.jinja").read_text(encoding="utf-8")
NO_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def chatml(
    *,
    head: str = "",
    words: str = "{{ m.content }}",
    audio: str = "<|audio_bos|><|AUDIO|><|audio_eos|>",
    part: str = "{{ part.text }}",
    close: str = "<|im_end|>\n",
    tail: str = "",
    ask: str = "<|im_start|>assistant\n",
) -> str:
    """A plain ChatML template, of which each part can be another."""
    parts = f"{{% for part in m.content %}}{{% if part.type == 'audio' %}}{audio}{{% else %}}{part}"
    return (
        f"{head}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n"
        f"{{% if m.content is string %}}{words}{{% else %}}{parts}{{% endif %}}{{% endfor %}}{{% endif %}}"
        f"{close}{{% endfor %}}{tail}{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    )


def row(prediction: str | None = None, *, user: str | None = None, system: str | None = None) -> Row:
    return Row(2, "a.wav", "a.wav", system, user, prediction, ())


def asked(template: str | ChatTemplate, **prompts: str | None) -> tuple[Span, ...]:
    return rendered(template, messages_of(row(**prompts), with_answer=False))


def trained(template: str | ChatTemplate, answer: str, **prompts: str | None) -> tuple[Span, ...]:
    return rendered(template, messages_of(row(answer, **prompts), with_answer=True))


def rendered(template: str | ChatTemplate, messages: tuple[Message, ...]) -> tuple[Span, ...]:
    return (template if isinstance(template, ChatTemplate) else ChatTemplate(template)).spans(messages)


def text(spans: tuple[Span, ...]) -> str:
    return "".join(span.text for span in spans)


def as_transformers(template: str, *, asking: bool, **more: str | None) -> str:
    """The same conversation by transformers' own renderer."""
    turns = messages_of(row(**{"prediction": "", **more}), with_answer=not asking)
    listed = []
    for turn in turns:
        audio = [{"type": "audio", "audio": "x.wav"}] if turn.has_audio else []
        words = [{"type": "text", "text": turn.text}] if turn.text is not None else []
        listed.append({"role": turn.role, "content": audio + words if audio else turn.text})
    texts, _ = render_jinja_template([listed], chat_template=template, add_generation_prompt=asking)
    return str(texts[0])


# --- what is rendered ------------------------------------------------------------------------------------

GOLDEN_TEXTS = json.loads((GOLDEN / "processor_real_vocab.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "answer", "prompts"),
    [
        ("gen_default_system", None, {"user": "Caption the audio."}),
        ("no_user_text", None, {}),
        ("train_default_system", "A dog.", {"user": "Caption the audio."}),
        ("train_system", "狗叫。", {"user": "Caption the audio.", "system": "Be brief."}),
    ],
)
def test_the_published_template(name, answer, prompts):
    spans = asked(PUBLISHED, **prompts) if answer is None else trained(PUBLISHED, answer, **prompts)
    assert text(spans) == GOLDEN_TEXTS[name]["text"]


def test_what_each_span_is():
    spans = trained(PUBLISHED, "rain", user="What?", system="Be brief.")
    assert spans == (
        Span("prompt", "<|im_start|>system\n", is_template=True),
        Span("prompt", "Be brief.", is_template=False),
        Span("prompt", "<|im_end|>\n<|im_start|>user\n<|audio_bos|>", is_template=True),
        Span("audio", "<|AUDIO|>", is_template=True),
        Span("prompt", "<|audio_eos|>", is_template=True),
        Span("prompt", "What?", is_template=False),
        Span("prompt", "<|im_end|>\n<|im_start|>assistant\n", is_template=True),
        Span("answer", "rain", is_template=False),
        Span("answer", "<|im_end|>", is_template=True),
        Span("prompt", "\n", is_template=True),
    )


def test_a_row_as_messages():
    user = Message("user", "What?", has_audio=True)
    assert messages_of(row("x", user="What?"), with_answer=False) == (user,)
    assert messages_of(row("x", user="What?"), with_answer=True) == (user, Message("assistant", "x"))
    assert messages_of(row(system="Be brief.", user="What?"), with_answer=False) == (
        Message("system", "Be brief."),
        user,
    )


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_prompt_is_no_turn_and_no_words(nothing):
    bare = (Message("user", None, has_audio=True),)
    assert messages_of(row(system=nothing, user=nothing), with_answer=False) == bare
    assert text(asked(PUBLISHED, system=nothing)).startswith(NO_SYSTEM)


def test_an_empty_answer_is_still_closed():
    answer = [span for span in trained(PUBLISHED, "") if span.kind == "answer"]
    assert "".join(span.text for span in answer) == "<|im_end|>"


# --- words are words -------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.sampled_from(
        [
            "<|im_start|>assistant\n",
            "<|im_end|>",
            "<|AUDIO|>",
            "<|audio_bos|><|AUDIO|><|audio_eos|>",
            "{{ messages[9] }}{% raise %}",
            "\ufdd00\ufdd1",
            "\ufdd02\ufdd1 and \ufdd01\ufdd1",
            " \n",
        ]
    ),
)


@settings(max_examples=100, deadline=None)
@given(system=WORDS, user=WORDS, answer=WORDS)
def test_words_change_nothing_but_themselves(system, user, answer):
    plain = trained(PUBLISHED, "C", system="A", user="B")
    other = trained(PUBLISHED, answer, system=system, user=user)
    there = {"A": system, "B": user, "C": answer}
    assert other == tuple(
        span if span.is_template else Span(span.kind, there[span.text], is_template=False) for span in plain
    )


# --- templates of other kinds ----------------------------------------------------------------------------

THINKING = chatml(
    head="{% set last = messages | length - 1 %}",
    words="{% if m.role == 'assistant' and loop.index0 == last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}",
)  # as Qwen3's: the answer is shown with an empty thought that the prompt does not ask for
GENERATION = chatml(
    words="{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}"
)
ASKS_FOR_A_THOUGHT = chatml(ask="<|im_start|>assistant\n<think>\n")
OFFERED = chatml(
    head="{% set ns = namespace(seen=0) %}"
    "{{ {'b': '<é>', 'a': [1]} | tojson(separators=(',', ':'), sort_keys=true) }}"
    "{{ strftime_now('%Y') }}{{ [1, 'ü'] | tojson(indent=1) }}{{ 'é' | tojson(ensure_ascii=true) }}"
    "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}"
    "{% set ns.seen = ns.seen + 1 %}{% endfor %}{{ ns.seen }}"
    "{% generation %}{% set hidden = 'h' %}{% endgeneration %}{{ hidden }}"
    "{% if tools or documents %}never{% endif %}{{ bos_token }}",
)
KINDS = {
    "published": PUBLISHED,
    "plain": chatml(),
    "thinking": THINKING,
    "generation": GENERATION,
    "asks for a thought": ASKS_FOR_A_THOUGHT,
    "what transformers offers": OFFERED,
}
SHAPES = [
    {"user": "What?", "system": "Be brief."},
    {"user": "What?"},
    {"system": "Be brief."},
    {},
]


@pytest.mark.parametrize("prompts", SHAPES, ids=["both", "user", "system", "none"])
@pytest.mark.parametrize("template", KINDS.values(), ids=KINDS)
def test_inference_is_asked_what_training_began_with(template, prompts):
    question = asked(template, **prompts)
    assert text(question) == as_transformers(template, asking=True, **prompts)
    example = trained(template, "rain", **prompts)
    assert example == (
        *question,
        Span("answer", "rain", is_template=False),
        Span("answer", "<|im_end|>", is_template=True),
        Span("prompt", "\n", is_template=True),
    )


@pytest.mark.parametrize("name", ["published", "plain", "generation", "what transformers offers"])
def test_training_shows_what_transformers_would(name):
    prompts = {"system": "Be brief.", "user": "What?"}
    whole = as_transformers(KINDS[name], asking=False, prediction="rain", **prompts)
    assert text(trained(KINDS[name], "rain", **prompts)) == whole


def test_the_date():
    assert str(datetime.now().year) in text(asked(OFFERED))


def test_the_tokenizer_s_own_tokens():
    template = ChatTemplate(
        chatml(head="{{ bos_token }}", close="{{ eos_token }}\n"),
        variables=(("bos_token", "<|begin|>"), ("eos_token", "<|im_end|>")),
    )
    assert text(trained(template, "rain", user="What?")) == (
        "<|begin|><|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|>What?<|im_end|>\n"
        "<|im_start|>assistant\nrain<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("audio", "shown"),
    [
        ("<|AUDIO|>", "<|audio_bos|><|AUDIO|><|audio_eos|>"),
        ("Audio: <|AUDIO|>\n", "Audio: <|audio_bos|><|AUDIO|><|audio_eos|>\n"),
        ("<|audio_bos|><|AUDIO|><|audio_eos|>", "<|audio_bos|><|AUDIO|><|audio_eos|>"),
        ("<|audio_bos|><|AUDIO|>", "<|audio_bos|><|AUDIO|>"),
        ("<|AUDIO|><|audio_eos|>", "<|AUDIO|><|audio_eos|>"),
        (
            "<|audio_bos|> <|AUDIO|> <|audio_eos|>",
            "<|audio_bos|> <|audio_bos|><|AUDIO|><|audio_eos|> <|audio_eos|>",
        ),
    ],
)
def test_marks_are_added_where_neither_is_there(audio, shown):
    question = text(asked(chatml(audio=audio), user="What?"))
    assert question == f"<|im_start|>user\n{shown}What?<|im_end|>\n<|im_start|>assistant\n"


def test_marks_in_words_are_none():
    bare = chatml(audio="<|AUDIO|>")
    assert "<|audio_eos|><|audio_eos|>What?" in text(asked(bare, user="<|audio_eos|>What?"))


def test_other_marks():
    template = ChatTemplate(chatml(audio="<a>"), marks=AudioMarks("<a>", "<b>", "<c>"))
    spans = asked(template, user="<|AUDIO|>")
    assert [span.text for span in spans if span.kind == "audio"] == ["<a>"]
    assert "<b><a><c><|AUDIO|>" in text(spans)


# --- templates that cannot be used -----------------------------------------------------------------------

DROPS = "it repeats words of a message or leaves them out"
PLACES = "it does not place <|AUDIO|> exactly once"
CLOSES = "it does not close an answer with <|im_end|>"
IN_TRAINING = "{% if messages | length > 2 %}"
UNFIT = {
    "drops the user's words": (chatml(part=""), DROPS),
    "drops the system's words": (
        chatml(words="{% if m.role != 'system' %}{{ m.content }}{% endif %}"),
        DROPS,
    ),
    "drops the answer": (chatml(words="{% if m.role != 'assistant' %}{{ m.content }}{% endif %}"), DROPS),
    "cuts words": (chatml(part="{{ part.text[:2] }}"), DROPS),
    "repeats the user's words": (chatml(part="{{ part.text }}{{ part.text }}"), DROPS),
    "repeats the system's words": (chatml(tail="{{ messages[0].content }}"), DROPS),
    "repeats the answer": (chatml(words="{{ m.content }}{{ m.content }}"), DROPS),
    "repeats the answer later": (
        chatml(tail=f"{IN_TRAINING}{{{{ messages[2].content }}}}{{% endif %}}"),
        DROPS,
    ),
    "repeats a prompt after the answer": (
        chatml(tail=f"{IN_TRAINING}{{{{ messages[1].content[1].text }}}}{{% endif %}}"),
        DROPS,
    ),
    "forgets the audio": (chatml(audio=""), PLACES),
    "places it twice": (chatml(audio="<|AUDIO|><|AUDIO|>"), PLACES),
    "places one more after the answer": (chatml(tail=f"{IN_TRAINING}<|AUDIO|>{{% endif %}}"), PLACES),
    "does not close the answer": (chatml(close="\n"), CLOSES),
    "closes it with something else": (chatml(close="</s>"), CLOSES),
    "closes it too late": (chatml(close=" <|im_end|>"), CLOSES),
    "is empty": ("", DROPS),
    "refuses": (chatml(head="{{ raise_exception('no system\nprompt') }}"), "no system prompt"),
    "is no Jinja": (chatml(head="{% if %}"), "Expected an expression, got 'end of statement block'"),
    "is cut off": (PUBLISHED[:-20], "Unexpected end of template"),
    "adds text to a list": (chatml(part="{{ m.content + 'x' }}"), "can only concatenate list"),
    "divides by zero": (chatml(head="{{ 1 // 0 }}"), "by zero"),
    "asks for what is not there": (chatml(head="{{ messages[7].role }}"), "list object has no element 7"),
    "reads a file": (chatml(head="{% include '/etc/hostname' %}"), "no loader"),
    "never ends": (chatml(head="{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "recursion"),
    "counts for ever": (chatml(head="{% for i in range(10**9) %}{% endfor %}"), "Range too big"),
}


def refused(template: str) -> str:
    """The English reason, without what all of them begin with; one sentence in either language."""
    with pytest.raises(ModelError) as caught:
        trained(template, "C", system="A", user="B")
    en, zh = caught.value.message.en, caught.value.message.zh
    start = "the model's chat template cannot be used: "
    assert en.startswith(start)
    assert zh.startswith("无法使用模型的对话模板：")
    assert "\n" not in en + zh
    return en.removeprefix(start)


@pytest.mark.parametrize(("template", "reason"), UNFIT.values(), ids=UNFIT)
def test_a_template_that_cannot_be_used(template, reason):
    assert reason in refused(template)


@pytest.mark.parametrize("reason", [DROPS, PLACES, CLOSES])
def test_our_own_reasons_are_translated(reason):
    template = next(template for template, said in UNFIT.values() if said == reason)
    with pytest.raises(ModelError) as caught:
        trained(template, "C", system="A", user="B")
    assert not any(word in caught.value.message.zh for word in ("it ", "does", "words"))


@pytest.mark.parametrize(
    "attempt",
    [
        "{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}",
        "{{{{ lipsum.__globals__['os'].system('touch {marker}') }}}}",
        "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
        "{{{{ (''|attr('__class__'))|attr('mro') }}}}{{{{ (''|attr('__class__')).mro() }}}}",
        "{{{{ '{{0.__class__}}'.format(messages)[0].upper() }}}}",
        "{{{{ ['{{0.__class__}}'.format] | map('call', 'x') | list }}}}",
        "{{{{ raise_exception.__globals__['json'] }}}}",
        "{{{{ strftime_now.__globals__['jinja2'] }}}}",
        "{{{{ messages.append(1) }}}}",
        "{{{{ messages[0].update(role='x') }}}}",
        "{{{{ self._TemplateReference__context.environment }}}}",
        "{{{{ dict.mro() }}}}",
        "{{% import 'os' as os %}}",
    ],
)
def test_a_template_stays_in_its_sandbox(attempt, tmp_path):
    marker = tmp_path / "escaped"
    refused(chatml(head=attempt.format(marker=marker)))
    assert not marker.exists()


BOMBS = {
    "loops in loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a number of a billion digits": "{{ 10 ** (10 ** 9) % 7 }}",
    "ten gigabytes of text": "{% set x = 'a' * 10 ** 10 %}",
    "text that doubles": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "an answer of megabytes": "{{ 'a' * 5000000 }}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_template_without_bounds_ends_at_ours(bomb, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(chatml(head=bomb)) == "it takes more than 1 s, 512 MB or 1024 KB of text"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
