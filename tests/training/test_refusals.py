"""What a training refuses or warns of, before any weight is loaded."""

import shutil
from dataclasses import replace

import pytest

from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.errors import DatasetError, InputError, ModelError, ToolkitError, UsageError
from mdl_toolkit.training import run as training
from mdl_toolkit.training.run import train
from tests.support.fleet import fleet
from tests.support.runs import (
    ANSWERS,
    convert,
    copy_checkpoint,
    make_csv,
    make_rows,
    train_options,
    write_csv,
)


@pytest.fixture
def model(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights is an error: what is refused must be refused before."""

    def fail(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(training, "load_model", fail)


@pytest.mark.usefixtures("no_weights")
class TestRefusals:
    def test_an_adapter_as_the_base(self, model, tmp_path):
        (model / "adapter_config.json").write_text("{}")
        shutil.copy(model / "model.safetensors", model / "adapter_model.safetensors")
        with pytest.raises(ModelError, match="an adapter; train the base model"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run"))

    @pytest.mark.parametrize("names", [("wandbb",), ("none", "tensorboard"), ("all", "wandb")])
    def test_trackers(self, model, tmp_path, names):
        with pytest.raises(UsageError, match="--report-to"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run", report_to=names))
        assert not (tmp_path / "run").exists()

    def test_a_tracker_that_is_not_installed(self, model, tmp_path):
        with pytest.raises(ToolkitError, match="neptune: not installed"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run", report_to=("neptune",)))

    def test_data_that_are_not_there(self, model, tmp_path):
        with pytest.raises(InputError, match="--train-dataset .*nowhere.csv: no such file"):
            train(train_options(tmp_path / "nowhere.csv", model, tmp_path / "run"))
        with pytest.raises(InputError, match="--eval-dataset .*nowhere: no such file"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run", eval_dataset="nowhere"))

    def test_bad_rows_of_the_evaluation_set(self, model, tmp_path):
        rows = make_rows(tmp_path / "audio", 3)
        rows[1]["audio"] = "missing.wav"
        bad = write_csv(tmp_path / "eval.csv", rows)
        with pytest.raises(InputError, match=r"line 3.*missing\.wav"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run", eval_dataset=str(bad)))
        assert not list((tmp_path / "run").glob("**/*"))

    def test_an_output_in_a_dataset_or_model(self, model, tmp_path):
        csv = make_csv(tmp_path, 2)
        data = convert(csv, model, tmp_path / "data")
        for output in (data, data / "run", model, model / "run", tmp_path):
            source = data if output != tmp_path else csv
            with pytest.raises(InputError, match="--output"):
                train(train_options(source, model, output))

    def test_a_dataset_of_another_tokenizer(self, model, tmp_path):
        data = convert(make_csv(tmp_path, 2), model, tmp_path / "data")
        template = model / "chat_template.jinja"
        template.write_text(template.read_text() + "{# changed #}")
        with pytest.raises(DatasetError, match="another chat template"):
            train(train_options(data, model, tmp_path / "run"))

    def test_a_model_without_weights(self, model, tmp_path):
        (model / "model.safetensors").unlink()
        with pytest.raises(ModelError, match="no weights"):
            train(train_options(make_csv(tmp_path, 2), model, tmp_path / "run"))

    def test_an_incomplete_checkpoint(self, model, tmp_path):
        options = train_options(make_csv(tmp_path, 2), model, tmp_path / "run")
        with pytest.raises(ModelError, match="not a complete checkpoint"):
            train(replace(options, resume_from_checkpoint=str(tmp_path)))

    def test_quantisation_without_its_package(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(ModelError, match=r"mdl-toolkit\[quantization\]"):
            train(
                train_options(
                    tmp_path / "not-even-looked-at", "nor/this", tmp_path / "run", quantization="4bit"
                )
            )


def test_conversion_options_with_converted_data_are_warned_of(model, tmp_path, capsys):
    data = convert(make_csv(tmp_path, 4), model, tmp_path / "data")
    train(train_options(data, model, tmp_path / "run", user_prompt="ignored", base_dir=str(tmp_path)))
    assert "converted already: --user-prompt, --base-dir ignored" in capsys.readouterr().err


@pytest.mark.parametrize("is_converted", [(True, True), (True, False), (False, True), (False, False)])
def test_options_that_do_not_reach_a_converted_set_are_named(model, tmp_path, is_converted):
    """Also where what was typed is the default: `--allow-truncated false`, `--user-prompt null`."""
    paths = []
    for name, converted in zip(("train", "eval"), is_converted, strict=True):
        csv = make_csv(tmp_path / name, 4)
        paths.append(convert(csv, model, tmp_path / f"{name}-data") if converted else csv)
    options = train_options(
        paths[0],
        model,
        tmp_path / "run",
        eval_dataset=str(paths[1]),
        base_dir=str(tmp_path),
        merge_lora=False,
    )
    words = as_command(options).split()[1:]
    words += [
        "--allow-truncated",
        "false",
        "--user_prompt",
        "null",
        "--num-workers=1",
        "--from-modelscope=no",
    ]
    with fleet(tmp_path) as start:
        job = start(words)
        assert job.end() == 0
    said = [line for line in job.said().splitlines() if "converted already" in line]
    names = "--user-prompt, --base-dir, --allow-truncated"
    assert (
        said
        == {
            (True, True): [f"warning: the data are converted already: --num-workers, {names} ignored"],
            (True, False): [f"warning: {paths[0]} is converted already: {names} ignored for it"],
            (False, True): [f"warning: {paths[1]} is converted already: {names} ignored for it"],
            (False, False): [],
        }[is_converted]
    )


def test_evaluation_options_without_evaluation_data_are_warned_of(model, tmp_path, capsys):
    options = train_options(make_csv(tmp_path, 4), model, tmp_path / "run", report_to=("tensorboard",))
    train(options)
    assert "ignored" not in capsys.readouterr().err
    train(replace(options, keep_best=True, early_stopping_patience=2, eval_steps=1))
    told = "there is no --eval-dataset: --eval-steps, --keep-best, --early-stopping-patience ignored"
    assert f"warning: {told}" in capsys.readouterr().err.splitlines()


def test_answers_of_the_fixture_differ_in_length():
    assert len({len(answer) for answer in ANSWERS}) > 3
