"""Messages: every template is translated, whole, and every call gives the fields that its template has."""

import ast
import pickle
import re
from gettext import GNUTranslations
from pathlib import Path
from string import Formatter

import pytest

from mdl_toolkit.errors import InputError, RowProblem, RowsError
from mdl_toolkit.i18n import Localized, Verbatim, join_messages
from tests.support.chinese import wrong_in
from tests.support.messages import ERRORS, MO, PO, SOURCE, TAKES, extracted, translated, written
from tests.support.paths import DOCS, PACKAGE, ROOT

PATHS = [path for path in sorted(SOURCE.rglob("*.py")) if path.name != "i18n.py"]
CHINESE = re.compile("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
# A template that is a frame for other texts: no word of its own to translate.
FRAME = re.compile(r"[^A-Za-z]*")
OWN = {"join_messages": {"left", "right"}}  # the fields that a function gives itself


def fields_of(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def calls(source: str) -> list[tuple[int, ast.expr, set[str]]]:
    """Line, template argument and given fields of every call that takes a template."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            position = TAKES.get(name, 0)
            if 0 < position <= len(node.args) and not is_other(name, node.args[position - 1]):
                given = {keyword.arg or "**" for keyword in node.keywords} if name != "option" else set()
                found.append((node.lineno, node.args[position - 1], given | OWN.get(name, set())))
    return found


def is_other(name: str, argument: ast.expr) -> bool:
    """Tell whether an argument is no template: several in one, or what a class of another kind is made of."""
    is_text = isinstance(argument, ast.JoinedStr | ast.BinOp) or (
        isinstance(argument, ast.Constant) and bool(argument.value)
    )
    return isinstance(argument, ast.Starred) or (name == "__init__" and not is_text)


def test_every_error_that_takes_a_template_is_known():
    for path in PATHS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and {getattr(base, "id", "") for base in node.bases} & {
                *ERRORS
            }:
                has_own = any(getattr(each, "name", "") == "__init__" for each in node.body)
                assert has_own or node.name in ERRORS, node.name


def wrong_calls(source: str) -> list[int]:
    """Lines of calls whose template is put together, or whose fields are not those of the template."""
    wrong = []
    for line, template, given in calls(source):
        if isinstance(template, ast.Constant):
            is_right = given == fields_of(template.value) or "**" in given
        else:  # a message that was made elsewhere
            is_right = given <= {"**"} and not isinstance(template, ast.JoinedStr | ast.BinOp)
        if not is_right:
            wrong.append(line)
    return wrong


def test_wrong_calls_are_found():
    source = (
        'say("a {b}", b=1)\nsay("a {b}")\nsay("a", b=1)\nsay(f"a {b}")\nwarn("a" + b)\nsay(message)\n'
        'Localized("{a:,} {b!r}", a=1, b=2)\noption(KIND, None, GROUP, "a", nullable=True)\n'
        'progress(9, "a {b}", c=1)\njoin_messages(found, "{left}, {right}")\nelse_where("{a}")\n'
    )
    assert wrong_calls(source) == [2, 3, 4, 5, 9]


@pytest.mark.parametrize("path", PATHS, ids=[path.relative_to(SOURCE).as_posix() for path in PATHS])
def test_every_call_gives_the_fields_of_its_template(path):
    assert wrong_calls(path.read_text(encoding="utf-8")) == []


def test_every_template_is_extracted():
    found = [template for path in PATHS for _, template, _ in calls(path.read_text(encoding="utf-8"))]
    literals = {template.value for template in found if isinstance(template, ast.Constant)}
    assert literals == {message.id for message in extracted() if message.id}


def test_every_template_is_translated_and_nothing_else():
    catalog = translated()
    assert {message.id for message in catalog if message.id} == {m.id for m in extracted() if m.id}
    assert [message.id for message in catalog if message.id and not message.string] == []
    assert [message.id for message in catalog if message.fuzzy] == [] == list(catalog.obsolete)
    assert len(catalog) > 300


def test_translations_have_the_fields_of_their_templates():
    for message in translated():
        assert fields_of(message.string) == fields_of(message.id) or not message.id, message.id


def test_chinese_has_one_word_for_one_thing():
    """The third column of the translators' glossary is what is not said."""
    lines = [line.split("|") for line in (PO.parents[2] / "README.md").read_text("utf-8").splitlines()]
    columns = [line[3].strip() for line in lines if len(line) == 5]
    wrong = [
        word
        for column in columns
        for word in column.split("、")
        if CHINESE.search(word) or word == "Huggingface"
    ]
    assert {"退出码", "渲染", "参考文本"} <= {*wrong}
    pages = [*DOCS.glob("*.zh.md"), ROOT / "README.zh.md", PACKAGE / "reporting/page/words.js"]
    assert len(pages) > 10
    texts = {page.name: page.read_text("utf-8") for page in pages}
    texts["messages"] = "\n".join(str(message.string) for message in translated())
    found = [(name, word) for name, text in texts.items() for word in wrong if word in text]
    assert found == []


def test_translations_are_chinese():
    for message in translated():
        if not FRAME.fullmatch(re.sub(r"\{[^{}]*\}", "", message.id)):
            assert CHINESE.search(message.string), message.id
        # What is put in for a placeholder is taken for Latin, unless it is Chinese itself.
        assert not wrong_in(re.sub(r"\{[^{}]*\}", "，", message.string)), message.string


def test_the_files_are_what_make_messages_writes():
    assert PO.read_text(encoding="utf-8") == written(translated()), "run: make messages"
    with MO.open("rb") as file:
        compiled = GNUTranslations(file)
    for message in translated():
        assert compiled.gettext(message.id) == message.string or not message.id, "run: make messages"


# --- one message -------------------------------------------------------------------------------------------


SIZES = Localized("{left}, {right}", left=Localized("(required)"), right="{x}")


def test_a_message_is_rendered_in_the_reader_s_language(monkeypatch):
    message = Localized("{option}: {accepted}, not {value}", option="--a", accepted=SIZES, value=Path("b"))
    assert str(message) == message.en == "--a: (required), {x}, not b"
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    assert str(message) == message.zh == "--a：（必需），{x}，而不是 b"


def test_a_template_without_translation_stays_english():
    assert Localized("no such {word}", word="template").zh == "no such template"


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "rows have"), (1, "row has"), (1.0, "row has"), ("1", "row has"), (1.5, "rows have")],
)
def test_a_word_follows_its_number(count, said):
    assert Localized("{count:row has|rows have} no answer", count=count).en == f"{said} no answer"


def test_no_count_has_a_plural_whatever_it_is():
    nouns = "rows|clips|steps|epochs|requests|predictions|recordings"
    fixed = re.compile(rf"(?<!of )(?<!all )(?<!first )\{{\w+[^{{}}|]*\}} ({nouns})\b")
    assert fixed.search("done: {steps} steps")
    assert not fixed.search("{done:,} of {rows} rows")
    assert [message.id for message in translated() if message.id and fixed.search(message.id)] == []


def test_messages_are_values():
    one, same, other = (Localized("{a} of {b}", a=1, b=b) for b in ("x", Path("x"), "y"))
    assert one == same != other
    assert len({one, same, other}) == 2
    assert one != "1 of x"


@pytest.mark.parametrize("message", [SIZES, Verbatim("one", "一"), Localized("{n:,}", n=1234)])
def test_messages_go_to_other_processes_and_into_files(message):
    there = pickle.loads(pickle.dumps(message))
    assert (there.en, there.zh) == (message.en, message.zh)
    read = Verbatim(**message.to_json())
    assert (read.en, read.zh) == (message.en, message.zh)
    assert read == message


def test_errors_go_to_other_processes():
    reason = Localized("the file is empty (0 bytes); get it again")
    for error in (InputError("{a}", a=1), RowsError("x.csv", [RowProblem(2, "audio", "a.wav", reason)])):
        there = pickle.loads(pickle.dumps(error))
        assert type(there) is type(error)
        assert (there.message.en, there.message.zh) == (error.message.en, error.message.zh)


def test_what_earlier_versions_wrote_of_a_row_is_read():
    values = {"line": 2, "column": "audio", "value": "a", "reason": {"en": "not {found}", "zh": "找不到"}}
    problem = RowProblem.from_json(values)
    assert (problem.reason.en, problem.reason.zh) == ("not {found}", "找不到")
    assert problem.to_json() == {**values, "may_pass": False}


def test_messages_of_one_kind_are_put_together():
    messages = [Localized("{text}", text=text) for text in "abc"]
    assert join_messages(messages, "{left}; {right}").zh == "a；b；c"
    assert join_messages(messages[:1], "{left}; {right}") == messages[0]


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError(28, "No space left on device", "/data/x"), "No space left on device"),
        (ValueError("first\n  second"), "first second"), (ValueError(), "ValueError"),
        (OSError("it is not there"), "it is not there"),
    ],
)  # fmt: skip
def test_an_exception_is_what_it_says_in_one_line(problem, said):
    assert Localized("x.csv: {reason}", reason=problem).en == f"x.csv: {said}"


def test_a_message_shows_values_as_a_terminal_may_show_them():
    shown = str(Localized("{path}: {text!r}\n", path="\x1b]0;x\x07\udc80\r.wav", text="\x1b" + "a" * 100_000))
    assert shown.startswith("\\x1b]0;x\\x07\\udc80\\r.wav: '\\x1baaa")
    assert shown.endswith("... (100,001)'\n")
    assert len(shown) < 5_000
