"""Several datasets: as one, shared by weights, evaluated one by one, and gone on with to the bit."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.types import weighted_paths
from mdl_toolkit.config.yaml import as_command, read_settings, to_yaml
from mdl_toolkit.data.concat import ConcatDataset, join_datasets
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.errors import ToolkitError, UsageError
from mdl_toolkit.training.run import train
from mdl_toolkit.training.sampler import BatchSampler, Mixture
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.provenance import read_provenance
from tests.support.fleet import fleet
from tests.support.paths import MODEL
from tests.support.runs import (
    convert,
    evaluations,
    history,
    make_csv,
    make_rows,
    train_options,
    write_csv,
)
from tests.support.weight_files import same_weights

RESUME = ("--resume-from-checkpoint", "true")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixing")
    for name, count in (("calls", 3), ("general", 10)):
        make_csv(folder, count, seed=count, name=f"{name}.csv")
    return folder


def options_of(place, output, *weights, **changes):
    data = [place / "calls.csv", place / "general.csv"]
    given = tuple(f"{path}={weight}" for path, weight in zip(data, weights, strict=True)) if weights else data
    settings = {"batch_size": 2, "num_epochs": 2, "save_steps": 1, "merge_lora": False, "lora_dropout": 0.1}
    return replace(
        train_options("x", MODEL, output, **{**settings, **changes}), train_dataset=tuple(map(str, given))
    )


# --- which examples ---------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 5)), min_size=2, max_size=4),
    st.integers(1, 7),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_epochs_have_the_shares_of_the_weights_and_rows_come_in_turn(sets, effective, seed):
    sizes, weights = zip(*sets, strict=True)
    lengths = np.random.default_rng(seed).integers(1, 50, sum(sizes))
    mixture = Mixture(sizes, weights)
    sampler = BatchSampler(lengths, lengths, effective, 1, 1, seed, mixture)
    ends = np.cumsum(sizes)
    times = np.zeros(len(lengths), int)
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        drawn = np.concatenate([sampler.examples(step) for step in steps])
        assert len(drawn) == len(lengths)
        counts = np.bincount(np.searchsorted(ends, drawn, side="right"), minlength=len(sizes))
        assert tuple(counts) == mixture.counts
        times += np.bincount(drawn, minlength=len(lengths))
        if not epoch:
            assert lengths[sampler.examples(0)[0]] == lengths.max()
        # No row comes a second time before all others of its set have come.
        for first, end in zip(ends - sizes, ends, strict=True):
            assert np.ptp(times[first:end]) <= 1
    exact = sum(sizes) * np.array(weights) / sum(weights)
    assert (np.abs(np.array(mixture.counts) - exact) <= len(sizes)).all()
    again = BatchSampler(lengths, lengths, effective, 1, 1, seed, Mixture(sizes, weights))
    assert (again.epoch(2) == sampler.epoch(2)).all()


def test_without_weights_the_order_is_that_of_one_dataset():
    lengths = np.random.default_rng(0).integers(1, 50, 90)
    orders = [BatchSampler(lengths, lengths, 4, 1, 1, seed, None).epoch(1) for seed in (3, 3, 4)]
    assert (orders[0] == orders[1]).all()
    assert sorted(orders[0]) == [*range(90)]
    assert (orders[0] != orders[2]).any()


# --- several datasets as one --------------------------------------------------------------------------------


def test_datasets_are_joined_example_by_example(place, tmp_path):
    parts = {
        str(tmp_path / name): ConvertedDataset(convert(place / f"{name}.csv", MODEL, tmp_path / name))
        for name in ("calls", "general")
    }
    joined = join_datasets(parts)
    assert isinstance(joined, ConcatDataset)
    one, other = parts.values()
    assert join_datasets({"x": one}) is one
    assert len(joined) == len(one) + len(other)
    for index in range(len(joined)):
        expected = one[index] if index < len(one) else other[index - len(one)]
        for found in (joined[index], joined.tokens(index)):
            assert (found.input_ids == expected.input_ids).all()
            assert (found.labels == expected.labels).all()
        assert (joined[index].waveform == expected.waveform).all()
    for name in ("token_counts", "supervised_counts", "audio_lengths"):
        both = np.concatenate([getattr(one, name), getattr(other, name)])
        assert (getattr(joined, name) == both).all()
    assert [joined.where(index) for index in (0, 2, 3, 12)] == [
        "calls:2",
        "calls:4",
        "general:2",
        "general:11",
    ]
    assert joined.record.prompts == one.record.prompts


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.csv", "b/x.csv", "c/x.csv"], ["x", "x-2", "x-3"]),
        (["a/x.csv", "a/x-3.csv", "b/x.csv", "c/x.csv"], ["x", "x-3", "x-2", "x-4"]),
        (["a/x.csv", "b/x.csv", "a/x-2.csv"], ["x", "x-2", "x-2-2"]),
        (["calls-2026.11", "calls-2026.12", "calls.csv"], ["calls-2026.11", "calls-2026.12", "calls"]),
    ],
)
def test_each_dataset_has_a_name_of_its_own_and_all_of_its_rows(place, tmp_path, monkeypatch, paths, names):
    """Of a file without its suffix; a folder's name has none, whatever follows its points."""
    one = ConvertedDataset(convert(place / "calls.csv", MODEL, tmp_path / "calls"))
    monkeypatch.chdir(tmp_path)
    for path in paths:
        if not path.endswith(".csv"):
            (tmp_path / path).mkdir()
    joined = join_datasets(dict.fromkeys(paths, one))
    assert [*joined.parts] == names
    assert len(joined) == len(joined.token_counts) == len(paths) * len(one)


def test_without_weights_a_run_is_that_of_the_rows_in_one_file(place, tmp_path):
    rows = [row for count in (3, 10) for row in make_rows(tmp_path / "audio", count, seed=count)]
    one = write_csv(tmp_path / "one.csv", rows)
    train(replace(options_of(place, tmp_path / "one"), train_dataset=str(one)))
    train(options_of(place, tmp_path / "two"))
    assert history(tmp_path / "one") == history(tmp_path / "two")
    assert same_weights(tmp_path / "one/final", tmp_path / "two/final")


def test_the_plan_and_the_record_tell_the_shares(place, tmp_path, capsys):
    train(options_of(place, tmp_path / "run", 3, 1, num_epochs=0.1))
    said = capsys.readouterr().err
    assert "training data: 13 rows" in said
    assert "  calls: 3 rows, 0.001 hours of audio; 76.9% of an epoch, in which a row comes 3.33 times" in said
    assert "23.1% of an epoch, in which a row comes 0.3 times" in said
    data = read_provenance(tmp_path / "run/final").data
    assert data["rows"] == 13
    assert [data[f"rows_of_{name}_in_an_epoch"] for name in ("calls", "general")] == [10, 3]
    assert [data[f"rows_of_{name}"] for name in ("calls", "general")] == [3, 10]


# --- evaluation --------------------------------------------------------------------------------------------


def test_each_evaluation_set_has_the_loss_that_it_has_alone(place, tmp_path, capsys):
    sets = {name: str(place / f"{name}.csv") for name in ("calls", "general")}
    given = {"both": tuple(sets.values()), **sets}
    for name, path in given.items():
        train(
            replace(options_of(place, tmp_path / name, 1, 2, num_epochs=0.5, eval_steps=2), eval_dataset=path)
        )
    both, *alone = ([*evaluations(tmp_path / name)] for name in given)
    assert len(both) == 2
    for line, *each in zip(both, *alone, strict=True):
        losses, tokens = zip(*((one["eval_loss"], one["eval_tokens"]) for one in each), strict=True)
        assert [line["eval_loss_calls"], line["eval_loss_general"]] == pytest.approx(losses, rel=1e-6)
        assert line["eval_loss"] == pytest.approx(np.average(losses, weights=tokens), rel=1e-6)
        assert line["eval_tokens"] == sum(tokens)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    said = capsys.readouterr().err
    assert f"loss of calls {both[-1]['eval_loss_calls']:.4g}, loss of general" in said
    assert "step      loss  loss_calls  loss_general\n" in said
    page = (tmp_path / "both/report.html").read_text()
    assert re.search(rf'"loss_calls": ?{both[-1]["eval_loss_calls"]}', page)
    metrics = read_provenance(tmp_path / "both/final").metrics
    assert metrics["eval_loss_calls"] == both[-1]["eval_loss_calls"]


# --- killed -------------------------------------------------------------------------------------------------


def test_killed_and_gone_on_with_it_ends_as_the_unbroken_run(place, tmp_path):
    changes = {"eval_dataset": (str(place / "calls.csv"), str(place / "general.csv")), "eval_steps": 3}
    whole, output = tmp_path / "whole", tmp_path / "run"
    # In the second epoch, after the first was ended.
    done = train(options_of(place, whole, 0.8, 0.2, num_epochs=1.5, **changes))
    assert done.steps == 11
    words = as_command(options_of(place, output, 0.8, 0.2, num_epochs=1.5, **changes)).split()[1:]
    with fleet(tmp_path) as start:
        job = start(words)
        assert job.until(partial(is_at, output, 5)), job.said()
        job.kill()
        job = start([*words, *RESUME])
        assert job.end() == 0, job.said()
    assert same_weights(output / "final", whole / "final")
    assert history(output) == history(whole)
    assert read_json(output / "checkpoint-11/state.json")["sampling"]["weights"] == [0.8, 0.2]


def is_at(output, step):
    return (output / f"checkpoint-{step}").is_dir()


def test_other_weights_are_named_when_a_run_goes_on(place, tmp_path, capsys):
    train(options_of(place, tmp_path / "run", 1, 1, num_epochs=0.5))
    changed = options_of(place, tmp_path / "run", 2, 1, resume_from_checkpoint=True)
    capsys.readouterr()
    train(changed)
    said = capsys.readouterr().err
    assert "options differ from the interrupted run's" in said
    assert "calls.csv=2, " in said
    assert "the rows come in another order" in said


# --- options ------------------------------------------------------------------------------------------------


def test_one_dataset_is_a_text_and_several_are_listed(tmp_path):
    options = TrainOptions(train_dataset="a.csv", output="run", eval_dataset=None)
    assert (options.train_dataset, options.eval_dataset) == ("a.csv", None)
    assert TrainOptions(train_dataset=("a.csv",), output="run", eval_dataset="null") == options
    several = TrainOptions(train_dataset=["a.csv=0.8", "b=.2"], output="run", eval_dataset=("c", "d"))
    assert "--train-dataset a.csv=0.8 --train-dataset b=.2" in as_command(several)
    (tmp_path / "x.yaml").write_text(to_yaml(several))
    assert TrainOptions(**read_settings(tmp_path / "x.yaml", TrainOptions)) == several


def test_a_weight_is_what_no_file_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b=2").touch()
    assert weighted_paths(("a.csv=0.8", "c=1=3", "d=1e-3")) == {"a.csv": 0.8, "c=1": 3, "d": 0.001}
    assert weighted_paths(("b=2", "a=x")) == {"b=2": None, "a=x": None}
    assert weighted_paths(None) == {}


@pytest.mark.parametrize("number", ["2024.11.30", "1.2.3", "0..8", ".", "1e", ""])
def test_what_is_no_number_is_a_part_of_the_path(place, tmp_path, number):
    path = f"{place}/date={number}"
    assert weighted_paths(path) == {path: None}
    with pytest.raises(ToolkitError, match=re.escape(f"--train-dataset {path}: no such file or folder")):
        train(train_options(path, MODEL, tmp_path / "run"))


def test_a_weight_that_nothing_shares_is_told(place, tmp_path, capsys):
    csv = place / "calls.csv"
    train(replace(options_of(place, tmp_path / "run", max_steps=1), train_dataset=f"{csv}=0.8"))
    assert f"{csv}: its weight is ignored, as there is no other --train-dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ("calls.csv=1", "general.csv"),
            "--train-dataset: expected a weight for each path, or for none, not 'calls.csv=1', 'general.csv'",
        ),
        (("calls.csv", "calls.csv"), "--train-dataset: expected each path once"),
        *(
            (
                ("calls.csv=1", f"general.csv={weight}"),
                "--train-dataset: expected finite weights above 0, not",
            )
            for weight in ("0", "0e5", "1e999", "1e-999")
        ),
        (("calls.csv", "gone.csv=2"), "--train-dataset: expected a weight for each path, or for none"),
        (("calls.csv=1", "gone.csv=2"), "--train-dataset gone.csv: no such file or folder"),
    ],
)
def test_what_cannot_be_mixed_is_refused_before_anything_is_made(place, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(place)
    with pytest.raises(ToolkitError, match=said):
        train(replace(train_options("x", MODEL, tmp_path / "run"), train_dataset=given))
    assert not (tmp_path / "run").exists()


def test_what_is_evaluated_has_no_weights():
    for weighted in ("b.csv=0.5", ("b.csv=0.5", "c.csv=0.5")):
        with pytest.raises(UsageError, match="--eval-dataset: expected paths without weights"):
            TrainOptions(train_dataset="a.csv", output="run", eval_dataset=weighted)


def test_bad_rows_of_all_files_are_told_together(place, tmp_path):
    bad = [
        write_csv(tmp_path / f"{name}.csv", [{"audio": f"{name}.wav", "prediction": "x"}]) for name in "ab"
    ]
    options = replace(options_of(place, tmp_path / "run"), train_dataset=tuple(map(str, bad)))
    with pytest.raises(ToolkitError) as refused:
        train(options)
    assert all(f"{name}.wav" in refused.value.message.en for name in "ab")
    assert not (tmp_path / "run/log.jsonl").exists()
