"""The command line, with the work behind it replaced by functions that only listen."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_toolkit.cli.click_options import OptionsCommand
from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.options import fields_in_order, spec_of, spelling
from mdl_toolkit.config.other_names import OTHER_NAMES
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.types import BOOLEAN, is_boolean_word
from tests.support.command_line import COMMANDS, CONVERT, LANGUAGES, TRAIN, Done, one_line, written

# Which command does which work


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (CONVERT, "data.convert.run"),
        (TRAIN, "training.run"),
        (("inference", "in.csv", "--output", "out.csv", "--model-name", "m"), "inference.run"),
        (("merge", "run/final", "--output", "out"), "training.merge"),
        (("check", "in.csv", "more.csv"), "api"),
        (("demo",), "demo"),
    ],
)
def test_a_command_does_its_work_once(door, words, module):
    assert door(*words) == Done(0, "", "")
    [(reached, options)] = door.reached
    assert reached == module
    assert words[0] == options.COMMAND


# Rule 1


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--merge-lora"], True), (["--merge-lora", "false"], False), (["--merge-lora=FALSE"], False),
        (["--merge-lora", "0"], False), (["--merge-lora", "Off"], False), (["--merge-lora=yes"], True),
        (["--no-merge-lora"], False), (["--no_merge_lora"], False), (["--merge_lora=no"], False),
        (["--no-merge-lora", "--merge-lora"], True), (["--merge-lora", "--no-merge-lora"], False),
        (["--merge-lora", "--lr", "1"], True), ([], True),
    ],
)  # fmt: skip
def test_booleans(door, words, value):
    assert door.options(*TRAIN, *words).merge_lora is value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None), (["--bf16"], True), (["--no-bf16"], False), (["--bf16", "null"], None),
        (["--bf16=null"], None), (["--bf16", "on"], True), (["--bf16", "false", "--bf16", "null"], None),
    ],
)  # fmt: skip
def test_a_boolean_that_may_be_absent(door, words, value):
    assert door.options(*TRAIN, *words).bf16 is value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--resume-from-checkpoint"], True), (["--resume-from-checkpoint", "--lr", "1"], True),
        (["--resume-from-checkpoint", "true"], True), (["--resume-from-checkpoint", "false"], None),
        (["--resume-from-checkpoint", "null"], None), (["--no-resume-from-checkpoint"], None),
        (["--resume-from-checkpoint", "out/checkpoint-5"], "out/checkpoint-5"),
        (["--resume_from_checkpoint=-odd"], "-odd"), (["--resume-from-checkpoint", "--"], True),
    ],
)  # fmt: skip
def test_resume_stands_alone_or_takes_a_path(door, words, value):
    assert door.options(*TRAIN, *words).resume_from_checkpoint == value


def test_a_bare_flag_leaves_the_word_after_it(door):
    options = door.options("convert-dataset", "--from-modelscope", "train.csv", "--output", "x")
    assert (options.from_modelscope, options.input) == (True, "train.csv")
    options = door.options("convert-dataset", "--from-modelscope", "false", "true", "--output", "x")
    assert (options.from_modelscope, options.input) == (False, "true")
    options = door.options("convert-dataset", "--output", "x", "--from-modelscope", "--", "false")
    assert (options.from_modelscope, options.input) == (True, "false")


BARE = [spelling(f.name) for f in fields_in_order(ConvertOptions) if spec_of(f).type is BOOLEAN]


@given(
    flags=st.lists(st.sampled_from(BARE), min_size=1, unique=True),
    word=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1),
    # `-` is refused.
    output=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1).filter(
        lambda text: text != "-"
    ),
)
@settings(max_examples=300, deadline=None)
def test_bare_flags_never_swallow_a_word(flags, word, output):
    if is_boolean_word(word) or (word.startswith("-") and word != "-"):
        word = f"./{word}"
    seen: list[ConvertOptions] = []
    command = OptionsCommand(ConvertOptions, seen.append)
    with command.make_context("convert-dataset", ["--output", output, *flags, word]) as context:
        command.invoke(context)
    [options] = seen
    assert (options.input, options.output) == (word, output)
    assert all(getattr(options, flag[2:].replace("-", "_")) is True for flag in flags)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_flags_take_no_value(door, language, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    done = door(*TRAIN, "--no-merge-lora=true")
    assert done.status == 2
    assert (
        one_line(done)
        == {
            "en": "error: train: --no-merge-lora takes no value",
            "zh_CN": "错误：train：--no-merge-lora 不带值",
        }[language]
    )


# Rule 2


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        ([], "from file"), (["--system-prompt", "null"], None), (["--system-prompt", ""], ""),
        (["--system-prompt="], ""), (["--system-prompt", "--no-merge-lora"], "--no-merge-lora"),
        (["--system-prompt", "--"], "--"), (["--system-prompt=a=b"], "a=b"),
        (["--system-prompt", "one", "--system-prompt", "two"], "two"),
    ],
)  # fmt: skip
def test_null_and_empty_override_the_file(door, words, prompt, tmp_path):
    config = written(tmp_path, "system_prompt: from file\n")
    options = door.options(*TRAIN, "--config", config, *words)
    assert options.system_prompt == prompt
    assert options.merge_lora is True


def test_empty_and_null_differ_only_over_a_file(door):
    assert door.options(*TRAIN, "--system-prompt", "null").system_prompt is None
    assert door.options(*TRAIN, "--system-prompt", "").system_prompt == ""


# Rule 3


@pytest.mark.parametrize(
    "words",
    [
        ["--report-to", "wandb", "--report-to", "tensorboard"],
        ["--report-to", "wandb,tensorboard"],
        ["--report_to=wandb, tensorboard", "--report-to", "wandb"],
        ["--report-to", '["wandb", "tensorboard"]'],
        ["--report-to", '["wandb"]', "--report-to", "tensorboard,wandb"],
    ],
)
def test_repeated_options_replace_file_and_default(door, words, tmp_path):
    config = written(tmp_path, "report_to: [swanlab]\ntrain_target: [lm_head]\n")
    options = door.options(*TRAIN, "--config", config, *words, "--train-target", "decoder")
    assert options.report_to == ("wandb", "tensorboard")
    assert options.train_target == ("decoder",)


def test_an_empty_list_replaces_too(door, tmp_path):
    config = written(tmp_path, "report_to: [swanlab]\n")
    assert door.options(*TRAIN, "--config", config, "--report-to", "[]").report_to == ()
    assert door.options(*TRAIN, "--config", config, "--report-to", "").report_to == ()


def test_the_last_of_two_values_wins(door):
    assert door.options(*TRAIN, "--lora-alpha", "x", "--lora-alpha=2").lora_alpha == 2


# Rule 4


@pytest.mark.parametrize(
    "words",
    [
        ["in.csv", "--output", "out", "--num-workers", "3"],
        ["--output", "out", "in.csv", "--num-workers", "3"],
        ["--output", "out", "--num-workers", "3", "in.csv"],
        ["--output", "out", "--num-workers", "3", "--", "in.csv"],
        ["--num_workers=3", "in.csv", "--output=out"],
    ],
)
def test_options_stand_before_or_after_the_input(door, words):
    options = door.options("convert-dataset", *words)
    assert options == ConvertOptions(input="in.csv", output="out", num_workers=3)


def test_after_two_dashes_everything_is_input(door):
    assert door.options("convert-dataset", "--output", "out", "--", "--no_x.csv").input == "--no_x.csv"


SUGGESTED = [
    (("train", "--lora-r", "8"), "train", "--lora-r", "--lora-rank"),
    (("train", "--lora_rnk=8"), "train", "--lora_rnk", "--lora-rank"),
    (("train", "--no-mergelora"), "train", "--no-mergelora", "--no-merge-lora"),
    (("train", "-output", "x"), "train", "-output", "--output"),
    (("convert-dataset", "--configs", "x"), "convert-dataset", "--configs", "--config"),
    (("train", "--learning-rate", "1"), "train", "--learning-rate", "--lr"),
    (("train", "--epochs", "1"), "train", "--epochs", "--num-epochs"),
    (("train", "--dataset", "x"), "train", "--dataset", "--train-dataset"),
    (("train", "--per_device_train_batch_size=1"), "train", "--per_device_train_batch_size", "--batch-size"),
    (("train", "--lr-scheduler-type", "cosine"), "train", "--lr-scheduler-type", "--lr-scheduler"),
    (("train", "--optim=adamw"), "train", "--optim", "--optimizer"),
    (("train", "--use-dora", "true"), "train", "--use-dora", "--lora-variant"),
    (("train", "--init-lora-weights=pissa"), "train", "--init-lora-weights", "--lora-variant"),
    (("inference", "--model", "x"), "inference", "--model", "--model-name"),
    (("--versoin",), "mdl-toolkit", "--versoin", "--version"),
]


@pytest.mark.parametrize(("words", "command", "typed", "meant"), SUGGESTED)
def test_an_unknown_option_is_one_line_with_a_suggestion(door, words, command, typed, meant, monkeypatch):
    done = door(*words)
    assert done.status == 2
    assert one_line(done) == f"error: {command}: no option {typed}; did you mean {meant}?"
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    assert one_line(door(*words)) == f"错误：{command}：没有选项 {typed}；您是不是想用 {meant}？"
    assert door.reached == []


@pytest.mark.parametrize(
    "name",
    ["--adam-beta1", "--deepspeed", "--logging_steps", "--val-size", "--fp16", "--group-by-length"],
)
@pytest.mark.parametrize(
    ("language", "line"), [("en", "nor one that does the same"), ("zh", "也没有类似的选项")]
)
def test_an_option_that_others_have_and_we_do_not_names_no_other(door, name, language, line, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    done = door(*TRAIN, name, "1")
    assert done.status == 2
    assert name in one_line(done)
    assert one_line(done).endswith(line)


def test_every_name_of_others_is_an_option_of_ours_or_none():
    ours = {
        field.name.replace("_", "-") for options in COMMANDS.values() for field in fields_in_order(options)
    }
    assert {*OTHER_NAMES.values()} - {""} <= ours
    assert not {*OTHER_NAMES} & ours


@pytest.mark.parametrize("words", [(*TRAIN, "--xyzzy"), (*TRAIN, "-x"), (*TRAIN, "--no-lr"), ("-9",)])
def test_an_unknown_option_like_no_other(door, words):
    done = door(*words)
    assert done.status == 2
    assert one_line(done).endswith(f"no option {words[-1]}; --help shows what there is")


@pytest.mark.parametrize(
    ("language", "line"),
    [
        ("en", "error: mdl-toolkit: no command trian; did you mean train?"),
        ("zh_CN", "错误：mdl-toolkit：没有命令 trian；您是不是想用 train？"),
    ],
)
def test_an_unknown_command(door, language, line, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    done = door("trian", "--train-dataset", "x")
    assert done.status == 2
    assert one_line(done) == line


def test_help_does_not_show_snake_case(door):
    done = door("train", "--help")
    assert "--lora-rank" in done.out
    assert "--lora_rank" not in done.out


@pytest.mark.parametrize(
    ("words", "en", "zh"),
    [
        (("train",), "train: missing --train-dataset, --output", "train：缺少 --train-dataset, --output"),
        (
            ("convert-dataset", "--output", "x"),
            "convert-dataset: missing INPUT",
            "convert-dataset：缺少 INPUT",
        ),
        (
            ("inference", "x", "--output", "y"),
            "inference: missing --model-name",
            "inference：缺少 --model-name",
        ),
        ((*TRAIN, "--lr"), "train: --lr needs a value", "train：--lr 需要一个值"),
        ((*TRAIN, "more.csv"), "train: unexpected argument 'more.csv'", "train：多余的参数 'more.csv'"),
        (
            (*CONVERT, "b.csv"),
            "convert-dataset: unexpected argument 'b.csv'",
            "convert-dataset：多余的参数 'b.csv'",
        ),
        ((*TRAIN, "--lr", "fast"), "--lr: expected a number, not 'fast'", "--lr：应为数字，而不是 'fast'"),
        (
            (*TRAIN, "--lr", "--lora-rank", "8"),
            "--lr: expected a number, not '--lora-rank'",
            "--lr：应为数字，而不是 '--lora-rank'",
        ),
        (
            (*TRAIN, "--report-to", "wandb", "--report-to", "[1]"),
            "--report-to: expected words (or null), not 'wandb', '[1]'",
            "--report-to：应为单词列表（或 null），而不是 'wandb', '[1]'",
        ),
        (
            (*TRAIN, "--config="),
            "--config: expected a path (or null), not ''",
            "--config：应为路径（或 null），而不是 ''",
        ),
        (
            (*TRAIN, "--debug=x"),
            "--debug: expected true or false, not 'x'",
            "--debug：应为 true 或 false，而不是 'x'",
        ),
        (("train", "--help=x"), "train: --help takes no value", "train：--help 不带值"),
        (
            ("completion", "tcsh"),
            "SHELL: expected one of bash, zsh, fish, not 'tcsh'",
            "SHELL：应为以下之一：bash, zsh, fish，而不是 'tcsh'",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(door, words, en, zh, monkeypatch):
    done = door(*words)
    assert done.status == 2
    assert one_line(done) == f"error: {en}"
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    assert one_line(door(*words)) == f"错误：{zh}"
    assert door.reached == []


# Rule 5


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(door, tmp_path):
    config = written(tmp_path, "train_dataset: f.csv\noutput: f\nlr: 1e-5\nlora-rank: 4\nmerge_lora: no\n")
    options = door.options("train", "--lora_rank", "16", "--config", config)
    assert options == TrainOptions(train_dataset="f.csv", output="f", lr=1e-5, lora_rank=16, merge_lora=False)


def test_the_file_may_hold_the_input(door, tmp_path):
    config = written(tmp_path, "input: f.csv\noutput: f\n")
    assert door.options("convert-dataset", "--config", config).input == "f.csv"
    assert door.options("convert-dataset", "g.csv", f"--config={config}").input == "g.csv"


def test_no_file_may_be_said(door):
    assert door.options(*TRAIN, "--config", "null") == TrainOptions(train_dataset="in.csv", output="out")


@pytest.mark.parametrize(
    ("content", "en", "zh"),
    [
        (
            "xyzzy: 1\nlora_rnk: 2\n",
            "train has no option lora_rnk (lora_rank?), xyzzy",
            "train 没有选项 lora_rnk (lora_rank?), xyzzy",
        ),
        ("lr: fast\n", "--lr: expected a number, not 'fast'", "--lr：应为数字，而不是 'fast'"),
        ("- 1\n", "expected `name: value` lines", "每行应为“名称: 值”的形式"),
        ("config: x.yaml\n", "train has no option config", "train 没有选项 config"),
    ],
)
def test_what_is_wrong_in_the_file_is_status_1_and_names_it(door, content, en, zh, tmp_path, monkeypatch):
    config = written(tmp_path, content)
    done = door(*TRAIN, "--config", config)
    assert done.status == 1
    assert one_line(done) == f"error: --config {config}: {en}"
    monkeypatch.setenv("LANGUAGE", "zh_CN")
    assert one_line(door(*TRAIN, "--config", config)) == f"错误：--config {config}：{zh}"


def test_a_missing_file_is_status_1(door, tmp_path):
    done = door(*TRAIN, "--config", str(tmp_path / "no.yaml"))
    assert done.status == 1
    assert one_line(done) == f"error: --config {tmp_path / 'no.yaml'}: file not found"


def test_the_command_line_is_blamed_before_the_file(door, tmp_path):
    config = written(tmp_path, "lr: fast\n")
    done = door(*TRAIN, "--config", config, "--lora-rank", "0")
    assert done.status == 2
    assert one_line(done).startswith("error: --lora-rank: ")


def test_what_neither_gives_is_a_usage_error(door, tmp_path):
    done = door("train", "--config", written(tmp_path, "output: x\n"))
    assert done.status == 2
    assert one_line(done) == "error: train: missing --train-dataset"
