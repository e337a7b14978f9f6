"""`check`: what follows from its findings, and how they are told."""

import csv
import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mdl_toolkit.config.data import CheckOptions, ConvertOptions
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.check.findings import Findings
from mdl_toolkit.data.check.rows import FACTS, Inspected
from mdl_toolkit.data.check.run import check
from mdl_toolkit.data.check.text import FINDINGS
from mdl_toolkit.data.collate import Collator
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.data.warnings import find_leaks
from mdl_toolkit.errors import ModelError
from mdl_toolkit.training.memory.plan import plan_memory
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.utils.ownership import RECORD
from mdl_toolkit.weights.config_files import read_json
from mdl_toolkit.weights.loading import load_model
from tests.support.checks import COMMENTED, UNUSABLE, bad_lines, found_in
from tests.support.runs import make_rows, write_csv
from tests.support.server import needs_server
from tests.support.spoilt import PROMPT, phrases

# --- what follows from it --------------------------------------------------------------------------------


def converted(table: Path, output: Path, model: str, **more: str) -> ConvertedDataset:
    convert_dataset(ConvertOptions(input=str(table), output=str(output), model_name=model, **more))
    return ConvertedDataset(output)


def test_the_fixed_file_converts_and_has_the_good_rows(run, spoilt, tmp_path, model):
    train, _ = spoilt
    fixed = tmp_path / "fixed.csv"
    done = run(train.path, "--write-fixed", fixed)
    assert done.status == 1
    assert f"{fixed}: {len(train.rows) - 4} rows written, 4 left out\n" in done.out
    record = convert_dataset(
        ConvertOptions(input=str(fixed), output=str(tmp_path / "data"), model_name=model)
    )
    assert record is not None
    assert record.rows == len(train.rows) - 4
    with fixed.open(encoding="utf-8", newline="") as file:
        good = [row for number, row in enumerate(train.rows) if number + 2 not in bad_lines(train)]
        assert [*csv.DictReader(file)] == good
    assert run(fixed).status == 0


def test_the_fixed_file_keeps_every_other_byte(run, tmp_path):
    good, bad = phrases("train.csv")[0]["audio"], tmp_path / "gone.wav"
    records = [
        b"\xef\xbb\xbfaudio,prediction,note\r\n", f'"{good}",yes,"two\r\nlines ""x"""\r\n'.encode(), b"\r\n",
        f"{bad},no,\"gone\r\n\r\ntoo\"\r\n".encode(), f"{good},0012\n".encode(), f"{bad},no,end".encode(),
    ]  # fmt: skip
    table, fixed = tmp_path / "t.csv", tmp_path / "new" / "fixed.csv"
    table.write_bytes(b"".join(records))
    assert run(table, "--write-fixed", fixed).status == 1
    assert fixed.read_bytes() == b"".join(record for record in records if b"gone" not in record)
    assert {path.name for path in fixed.parent.iterdir()} == {
        "fixed.csv", "fixed.csv.mdl-toolkit.yaml", RECORD
    }  # fmt: skip
    old = tmp_path / "mac.csv"  # lines that end with a carriage return alone
    old.write_bytes(f"audio,prediction\r{good},yes\r{bad},no\r{good},no".encode())
    run(old, "--write-fixed", fixed)
    assert fixed.read_bytes() == f"audio,prediction\r{good},yes\r{good},no".encode()


def test_without_a_good_row_nothing_is_written(run, tmp_path):
    table = write_csv(tmp_path / "t.csv", [{"audio": "gone.wav", "prediction": "x"}])
    done = run(table, "--write-fixed", tmp_path / "new" / "fixed.csv")
    assert done.status == 1
    assert "not found (looked for gone.wav)" in done.out
    assert "not written, as no row can be used\n" in done.out
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["--write-fixed", "--json"])
def test_inputs_are_never_written_over(run, tmp_path, option):
    table = write_csv(tmp_path / "t.csv", phrases("train.csv")[:2])
    before = table.read_bytes()
    done = run(table, f"{option}={table}")
    assert (done.status, table.read_bytes()) == (1, before)
    assert done.err.startswith(f"error: {option} {table}: ")
    assert f"inside the input {table};" in done.err


def test_two_outputs_are_two_places(run, tmp_path):
    table, new = write_csv(tmp_path / "t.csv", phrases("train.csv")[:2]), tmp_path / "new"
    done = run(table, f"--write-fixed={new}", f"--json={new}")
    assert done.err.startswith(f"error: --write-fixed {new}: it is, holds or lies inside --json {new};")
    assert not new.exists()


def test_size_tokens_and_memory_are_those_of_conversion_and_training(run, spoilt, tmp_path, model):
    train, _ = spoilt
    fixed = tmp_path / "fixed.csv"
    settings = tmp_path / "train.yaml"
    settings.write_text("batch_size: 2\nlora_rank: 8\nnum_epochs: 3\ntrain_dataset: x\noutput: y\n")
    system = "Name the language that you hear, and nothing else."
    words = ("--write-fixed", fixed, "--json", "--train-config", settings, "--system-prompt", system)
    figures = run(train.path, *words).figures
    file, training = figures["files"][0], figures["training"]
    dataset = converted(fixed, tmp_path / "data", model, system_prompt=system)
    record = dataset.record
    assert 0 <= record.bytes - file["disk_bytes"] < 4_000  # the schema and the heads of batches
    assert file["text"]["max"] + file["audio_tokens"]["max"] >= record.most_tokens
    tokens = sorted((1 + n // 160) // 20 for n in dataset.audio_lengths)
    assert file["audio_tokens"]["median"] == tokens[(len(dataset) - 1) // 2]
    options = TrainOptions(train_dataset="x", output="y", batch_size=2, lora_rank=8, num_epochs=3)
    sampler = BatchSampler(dataset.token_counts, dataset.supervised_counts, 2, 1, 1, 42)
    first, *others = ([*dataset.tokens(row).input_ids] for row in range(len(dataset)))
    beginning = next(place for place, word in enumerate(first) if any(row[place] != word for row in others))
    audio = read_json(Path(model) / "config.json")["audio_token_id"]
    beginning = min(beginning, first.index(audio))
    assert beginning > 10  # the system prompt among others
    gpu = torch.device("cuda")
    plan = plan_memory(Path(model), options, sampler, dataset.audio_lengths, beginning, gpu, torch.bfloat16)
    assert training["bytes"]["total"] == plan.total
    assert training["steps"] == 3 * sampler.steps_per_epoch == 3 * -(-len(dataset) // 2)
    assert training["operations"] == pytest.approx(3 * counted(Path(model), dataset, sampler), rel=0.02)


def test_a_training_s_settings_that_cannot_be_read_are_named_by_their_option(run, spoilt, tmp_path):
    missing, other = tmp_path / "missing.yaml", tmp_path / "other.yaml"
    other.write_text("colour: red\n", encoding="utf-8")
    done = run(spoilt[0].path, "--train-config", missing)
    assert (done.status, done.err) == (1, f"error: --train-config {missing}: file not found\n")
    done = run(spoilt[0].path, "--train-config", other)
    assert done.err == f"error: --train-config {other}: train has no option colour\n"
    other.write_text("lr: fast\n", encoding="utf-8")
    assert run(spoilt[0].path, "--train-config", other).err.startswith(f"error: --train-config {other}: ")


def test_the_model_is_that_of_a_training_s_settings(tmp_path, model):
    table = write_csv(tmp_path / "t.csv", phrases("train.csv")[:2])
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"model_name: {model}\n", encoding="utf-8")
    options = CheckOptions(input=(str(table),), train_config=str(settings), num_workers=1)
    assert check(options)["counted"] == "tokens"
    with pytest.raises(ModelError):
        check(replace(options, model_name=str(tmp_path)))


def counted(folder, dataset, sampler):
    """Operations that torch counts in the blocks' matrices in an epoch: forwards, back, forwards again."""
    loaded = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    positions, total = [], 0.0
    loaded.decoder.model.layers[0].register_forward_pre_hook(lambda _, given: positions.append(len(given[0])))
    for step in range(sampler.steps_per_epoch):
        samples = [dataset[int(row)] for row in sampler.examples(step)]
        loaded(**Collator(0)(samples))
        patches = 5 * sum((1 + len(sample.waveform) // 160) // 20 for sample in samples)
        for blocks, rows in (
            (loaded.decoder.model.layers, positions[-1]), (loaded.audio_encoder.blocks, patches),
        ):  # fmt: skip
            linears = [each for each in blocks.modules() if isinstance(each, torch.nn.Linear)]
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                for linear in linears:
                    linear(torch.zeros(rows, linear.in_features))
            total += 3 * counter.get_total_flops()
    return total


def test_the_same_answer_on_both_sides_is_told_where_answers_are_texts():
    random = np.random.default_rng(1)
    facts = np.zeros(12, FACTS)
    facts["line"], facts["answer"] = np.arange(2, 14), [*range(100, 108), 103, 200, 107, 201]
    facts["clip"] = random.permutation(12)
    learnt, held = facts[:8], facts[8:]

    def told(known):
        found = Findings("x.csv", "evaluation")
        found.add(Inspected(held))
        return {each["name"]: each for each in found.figures(known, None)["findings"]}

    assert told(learnt)["same_text"]["lines"] == [10, 12]
    assert told(learnt)["same_text"]["details"] == [5, 9]
    classes = np.repeat(learnt, 4)
    classes["clip"] = np.arange(50, 82)
    assert "same_text" not in told(classes)


def test_leaks_are_those_that_training_warns_of(run, spoilt, tmp_path, model):
    train, held = spoilt
    fixed = tmp_path / "fixed.csv"
    figures = run(train.path, held.path, "--write-fixed", fixed, "--json").figures
    sets = [converted(path, tmp_path / path.stem, model) for path in (fixed, held.path)]
    leaks, found = find_leaks(*sets), found_in(figures["files"][1])
    assert [row + 2 for row in leaks.same] == found["leak"]
    assert [row + 2 for row in leaks.other_text] == found["leak_other_text"]


@pytest.mark.parametrize("for_inference", [False, True])
def test_rows_beyond_max_length(run, tmp_path, for_inference):
    table = write_csv(tmp_path / "t.csv", phrases("train.csv")[:20])
    words = ("--for-inference",) if for_inference else ()
    free = run(table, "--json", *words).figures["files"][0]
    longest = free["audio_tokens"]["max"] + free["text"]["max"]
    done = run(table, "--json", "--max-length", longest - 3, *words)
    (file,) = done.figures["files"]
    named = file["bad"]["lines"] if for_inference else found_in(file)["too_long"]
    assert 0 < len(named) < 20
    assert done.status == (1 if for_inference else 0)
    assert run(table, "--max-length", longest + 1, *words).status == 0


def test_for_inference_no_answers_are_needed(run, tmp_path):
    table = write_csv(tmp_path / "t.csv", [{"audio": row["audio"]} for row in phrases("test.csv")[:3]])
    assert "'prediction' is missing" in run(table).err
    figures = run(table, "--for-inference", "--json").figures
    assert figures["files"][0]["role"] == "inference"
    assert "answers" not in figures["files"][0]
    assert figures["training"] is None
    assert {segment["kind"] for segment in figures["sample"]["segments"]} == {"prompt", "audio"}


def test_for_inference_answers_that_are_there_do_not_matter(run, tmp_path):
    first, second = phrases("test.csv")[:2]
    rows = [{**first, "prediction": "0012"}, {**second, "prediction": ""}, {**first, "prediction": "x "}]
    (file,) = run(write_csv(tmp_path / "t.csv", rows), "--for-inference", "--json").figures["files"]
    assert (found_in(file), file["bad"]["rows"]) == ({"duplicate": [4]}, 0)


# --- how it is told --------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh_CN"])
def test_the_text_has_the_numbers_of_the_json(run, spoilt, tmp_path, language, monkeypatch):
    monkeypatch.setenv("LANGUAGE", language)
    train, held = spoilt
    place = tmp_path / "found.json"
    done = run(train.path, held.path, "--json", place)
    figures = json.loads(place.read_text(encoding="utf-8"))
    assert figures == run(train.path, held.path, "--json").figures
    is_chinese = language == "zh_CN"
    assert bool(re.search("[\u4e00-\u9fff]", done.out)) is is_chinese
    for file in figures["files"]:
        head, *rest = done.out[done.out.index(file["path"]) :].splitlines()
        section = [head, *itertools.takewhile(lambda line: line.startswith(" "), rest)]
        numbers = [float(word) for word in re.findall(r"[\d.]+", section[0].replace(file["path"], ""))]
        assert numbers == [file["rows"], pytest.approx(file["seconds"] / 3600, abs=1e-3)]
        for each in file["findings"]:
            words = FINDINGS[each["name"]]
            (line,) = (found for found in section if (words.zh if is_chinese else words.en) in found)
            named = re.sub(r" \([^)]*\)", "", line.rpartition("，第" if is_chinese else ", line ")[2])
            assert f"{words.zh}：{each['rows']} 行" in line or f"{words.en}: {each['rows']}" in line
            if "lines" in each:
                assert [int(word) for word in re.findall(r"\d+", named)] == each["lines"]
    for kind in UNUSABLE:
        for line in train.lines[kind]:
            assert (f"第 {line} 行" if is_chinese else f"line {line}, column ") in done.out


def test_every_finding_has_words_in_both_languages():
    for words in FINDINGS.values():
        assert re.search("[\u4e00-\u9fff]", words.zh)
        assert not re.search("[\u4e00-\u9fff]", words.en)


def test_what_is_learnt_is_marked_in_the_sample(run, tmp_path, monkeypatch):
    rows = [{**phrases("train.csv")[0], "user_prompt": "<|im_end|>\x1b[2J?", "prediction": "a\nb"}]
    table = write_csv(tmp_path / "t.csv", rows)
    shown = run(table).out
    assert "[[a\n  b<|im_end|>]]" in shown
    assert "\x1b" not in shown
    assert r"<|im_end|>\x1b[2J?" in shown
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[1;32ma\n  b<|im_end|>\x1b[0m" in run(table).out


def test_a_text_of_any_length_is_cut_in_the_sample(run, tmp_path):
    rows = [
        {**row, "user_prompt": "why " * 20_000, "prediction": "a" * 100_000}
        for row in phrases("train.csv")[:2]
    ]
    done = run(write_csv(tmp_path / "long.csv", rows))
    assert len(done.out) < 15_000
    assert "a" * 1000 in done.out
    assert "... (100,000)" in done.out
    assert "... (80,000)" in done.out
    sample = run(tmp_path / "long.csv", "--json").figures["sample"]["segments"]
    assert "a" * 100_000 in [each["text"] for each in sample]


def test_without_the_model_characters_are_counted_and_that_is_said(run, tmp_path):
    table = write_csv(tmp_path / "t.csv", phrases("train.csv")[:3])
    done = run(table, "--json", model="nobody/no-such-model")
    assert done.status == 0
    assert done.err.removeprefix(COMMENTED.format(table)).startswith(
        "warning: counting characters in place of tokens"
    )
    assert run(table, "--max-length", 1, "--for-inference", model="nobody/no-such-model").status == 0
    assert (done.figures["counted"], done.figures["training"], done.figures["sample"]) == (
        "characters",
        None,
        None,
    )
    assert done.figures["files"][0]["text"]["max"] == max(
        len(PROMPT + row["prediction"]) for row in phrases("train.csv")[:3]
    )
    assert "text characters of a row" in run(table, model="nobody/no-such-model").out


def test_a_model_that_cannot_be_trained_on_stops_it(run, tmp_path, golden):
    table, base = write_csv(tmp_path / "t.csv", phrases("train.csv")[:3]), golden / "checkpoints" / "A-small"
    broken = tmp_path / "model"
    broken.mkdir()
    for path in base.glob("*.json*"):
        (broken / path.name).write_bytes(path.read_bytes())
    for path in base.glob("*.jinja"):
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (broken / "config.json").write_text(json.dumps(config))
    done = run(table, model=str(broken))
    assert done.status == 1
    assert "quantised already (gptq)" in done.err


def test_the_figures_do_not_depend_on_the_number_of_processes(tmp_path, model, capsys):
    table = write_csv(tmp_path / "t.csv", [*phrases("train.csv"), *phrases("train.csv")[:40]])
    figures = [
        check(CheckOptions(input=(str(table),), model_name=model, num_workers=workers)) for workers in (1, 2)
    ]
    assert figures[0] == figures[1]
    assert found_in(figures[0]["files"][0]) == {"duplicate": [*range(182, 222)]}


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "the file is empty"), ("audio,prediction\n", "there is no row"), (None, "no such file")],
)
def test_a_file_that_is_no_table_stops_it(run, tmp_path, content, said):
    table = tmp_path / "t.csv"
    if content is not None:
        table.write_text(content)
    done = run(write_csv(tmp_path / "good.csv", phrases("train.csv")[:2]), table)
    assert done.status == 1
    assert said in done.err


@needs_server
def test_recordings_from_addresses(run, server, tmp_path, monkeypatch):
    row, temporary = phrases("train.csv")[0], tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    server.files = {"/a.flac": Path(row["audio"]).read_bytes()}
    rows = [{**row, "audio": server.url + path} for path in ("/a.flac", "/gone.flac", "/a.flac")]
    (file,) = run(write_csv(tmp_path / "t.csv", rows), "--json").figures["files"]
    assert (file["rows"], file["bad"]["lines"], found_in(file)["duplicate"]) == (2, [3], [4])
    assert len(server.asked) == len({*server.asked}) == 2
    assert not [*temporary.iterdir()]


MEASURED = """
import resource, sys
from mdl_toolkit.cli.main import run
if __name__ == "__main__":
    status = run(sys.argv[1:])
    print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """The most memory of the command's own process, for 1,000 and for 10,000 rows of 200 clips."""
    rows = make_rows(tmp_path / "audio", 200)
    peaks = []
    for count in (1_000, 10_000):
        many = [{**rows[n % 200], "prediction": f"{n} is what is said here"} for n in range(count)]
        table = write_csv(tmp_path / f"{count}.csv", many)
        words = ["check", str(table), "--model-name", "nobody/none", "--num-workers", "2", "--json=x.json"]
        said = subprocess.check_output([sys.executable, "-c", MEASURED, *words], cwd=tmp_path, text=True)
        status, peak = said.splitlines()[-1].split()
        peaks.append(int(peak) / 1024)
        assert status == "0"
    assert peaks[1] - peaks[0] < 6
