"""Cached audio features: the same run with each row encoded once, and nothing stale is ever read."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mdl_toolkit.config.data import ConvertOptions
from mdl_toolkit.config.yaml import as_command
from mdl_toolkit.data.collate import Collator, PrecomputedSample, items_of, split
from mdl_toolkit.data.convert.run import convert_dataset
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.errors import DatasetError, InputError, UsageError
from mdl_toolkit.model import MiDashengLMModel
from mdl_toolkit.model.encoder import MiDashengEncoder
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.training import feature_cache as features
from mdl_toolkit.training import run as training
from mdl_toolkit.training.checkpoints import checkpoints
from mdl_toolkit.training.feature_cache import FeatureCache
from mdl_toolkit.training.run import train
from mdl_toolkit.utils.distributed import World
from tests.support.fleet import die_before, fleet, start_ranks
from tests.support.paths import MODEL
from tests.support.runs import LENGTHS, files_below, history, make_csv, train_options
from tests.support.weight_files import same_weights

ROWS, EVAL_ROWS = 11, 5


def options_of(place, output, **changes):
    """Three epochs of 11 rows in steps of 4: partial steps, five evaluations."""
    settings = {
        "cache_audio_features": True, "train_target": ("decoder",), "batch_size": 2, "lr": 1e-3,
        "gradient_accumulation_steps": 2, "num_epochs": 3, "eval_dataset": str(place / "eval.csv"),
        "eval_steps": 2, "merge_lora": False,
    }  # fmt: skip
    data = changes.pop("train_dataset", place / "train.csv")
    return train_options(data, MODEL, output, **{**settings, **changes})


def command(place, output, *words, **changes):
    return [*as_command(options_of(place, output, **changes)).split()[1:], *words]


def check_follows(output, plain, tolerance=1e-5):
    assert len(history(output)) == len(history(plain)) > 0
    for found, expected in zip(history(output), history(plain), strict=True):
        assert found == pytest.approx(expected, rel=tolerance)
    assert files_below(output) == files_below(plain)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows; in `plain` and `cached` what a run without and with the option makes of them."""
    folder = tmp_path_factory.mktemp("features")
    make_csv(folder, ROWS)
    make_csv(folder, EVAL_ROWS, seed=40, name="eval.csv")
    train(options_of(folder, folder / "plain", cache_audio_features=False))
    train(options_of(folder, folder / "cached"))
    return folder


@pytest.fixture
def start(tmp_path):
    with fleet(tmp_path) as start:
        yield start


@pytest.fixture
def encoded(monkeypatch):
    """How many clips the encoder was given each time."""
    seen, real = [], MiDashengEncoder.forward

    def forward(self, waveforms, lengths):
        seen.append(len(lengths))
        return real(self, waveforms, lengths)

    monkeypatch.setattr(MiDashengEncoder, "forward", forward)
    return seen


# --- the same run -------------------------------------------------------------------------------------------


def test_losses_are_the_same_and_no_file_is_left(place):
    """Loss, gradient norm and evaluation of every step; nine steps and five evaluations."""
    assert len(history(place / "plain")) == 14
    check_follows(place / "cached", place / "plain")
    assert not (place / "cached/.dataset").exists()


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"train_target": ("embed_tokens",)}, 1e-5),
        ({"train_target": ("decoder", "lm_head"), "gradient_checkpointing": True}, 1e-5),
        ({"batch_size": 5, "gradient_accumulation_steps": 1, "eval_batch_size": 3}, 1e-5),
        ({"bf16": True}, 1e-2),
        ({"bf16": True, "train_target": ("embed_tokens",)}, 1e-2),
        ({"eval_metric": "cer"}, 1e-5),
    ],
)
def test_losses_are_the_same_with_other_settings(place, tmp_path, changes, tolerance):
    train(options_of(place, tmp_path / "plain", cache_audio_features=False, **changes))
    train(options_of(place, tmp_path / "run", **changes))
    check_follows(tmp_path / "run", tmp_path / "plain", tolerance)


@pytest.mark.parametrize("bf16", [False, True])
def test_where_no_rows_share_a_batch_not_even_rounding_differs(place, tmp_path, bf16):
    changes = {"batch_size": 1, "gradient_accumulation_steps": 4, "bf16": bf16}
    train(options_of(place, tmp_path / "plain", cache_audio_features=False, **changes))
    train(options_of(place, tmp_path / "run", **changes))
    assert history(tmp_path / "run") == history(tmp_path / "plain")
    assert same_weights(tmp_path / "run/final", tmp_path / "plain/final")


@pytest.mark.parametrize(
    ("changes", "clips"),
    [
        ({}, ROWS + EVAL_ROWS),
        ({"eval_dataset": None}, ROWS),
        ({"num_epochs": 1}, ROWS + EVAL_ROWS),  # the training rows by training itself
        ({"eval_steps": 0}, ROWS + EVAL_ROWS),  # one evaluation
        ({"cache_audio_features": False}, 3 * ROWS + 5 * EVAL_ROWS),
    ],
)
def test_every_clip_is_encoded_once(place, tmp_path, encoded, changes, clips):
    train(options_of(place, tmp_path / "run", **changes))
    assert sum(encoded) == clips


@pytest.mark.parametrize("most", [1, 3])
def test_too_little_memory_changes_nothing(place, tmp_path, monkeypatch, most):
    """In the pass before the first step, and in the steps, whose parts find their features."""
    real, real_loss = MiDashengLMModel.audio_features, training.ForwardPass.loss

    def scarce(self, clips, lengths):
        check_room(len(clips))
        return real(self, clips, lengths)

    def scarce_loss(self, batch, tokens):
        check_room(len(batch["input_ids"]))
        return real_loss(self, batch, tokens)

    def check_room(rows):
        if rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    sizes = {"batch_size": 4, "gradient_accumulation_steps": 1, "eval_batch_size": 1}
    train(options_of(place, tmp_path / "plain", cache_audio_features=False, **sizes))
    monkeypatch.setattr(MiDashengLMModel, "audio_features", scarce)
    monkeypatch.setattr(training.ForwardPass, "loss", scarce_loss)
    train(options_of(place, tmp_path / "run", **sizes))
    check_follows(tmp_path / "run", tmp_path / "plain")


@pytest.mark.parametrize("most", [1, 2, 4])
def test_parts_of_a_batch_are_what_the_collator_makes_of_their_rows(place, tmp_path, most):
    data = str(tmp_path / "data")
    convert_dataset(ConvertOptions(input=str(place / "train.csv"), output=data, model_name=str(MODEL)))
    dataset, rows = ConvertedDataset(tmp_path / "data"), []
    for index, samples in enumerate(LENGTHS):
        tokens, features = dataset.tokens(index), torch.randn(audio_token_count(samples), 8)
        rows.append(PrecomputedSample(tokens.input_ids, tokens.labels, features, samples))
    parts = list(split(Collator(7)(rows), most))
    wanted = [Collator(7)(rows[start : start + most]) for start in range(0, len(rows), most)]
    for part, expected in zip(parts, wanted, strict=True):
        assert "input_values" not in part
        for name, tensor in items_of(part):
            assert torch.equal(tensor, dict(items_of(expected))[name]), name


# --- killed, and several processes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment", ["features/0-0", "features/1-0", r"/\.checkpoint-3\.partial-\w+/state\.json", "final.partial"]
)
def test_a_killed_run_goes_on_as_the_unbroken_one(place, tmp_path, start, moment):
    """To the bit, whether it was killed while features were written, within training or at its end."""
    output = tmp_path / "run"
    words = command(place, output, save_steps=1)
    event = "os.rename" if "final" in moment else "open"
    assert start(words, partial(die_before, event, moment)).end() == -9
    assert (output / ".dataset/features").is_dir()
    again = start([*words, "--resume-from-checkpoint", "true"])
    assert again.end() == 0, again.said()
    assert same_weights(output / "final", place / "cached/final")
    assert history(output) == history(place / "cached")
    assert not (output / ".dataset").exists()


def test_features_that_a_killed_run_left_are_not_read(place, tmp_path):
    """Not even by a run that needs files of the same size."""
    left = tmp_path / "run/.dataset/features"
    left.mkdir(parents=True)
    for name in ("0-0", "1-0", "0-1"):
        (left / name).write_bytes(bytes(10_000))
    train(options_of(place, tmp_path / "run"))
    assert history(tmp_path / "run") == history(place / "cached")


@pytest.mark.parametrize(("rows", "processes"), [(ROWS, 2), (1, 2)])
def test_several_processes_share_the_work(place, tmp_path, start, rows, processes):
    """A process may have no row at all."""
    data = place / "train.csv" if rows == ROWS else make_csv(tmp_path, rows)
    one = tmp_path / "one"
    train(options_of(place, one, train_dataset=data, batch_size=4, gradient_accumulation_steps=1))
    words = command(
        place, tmp_path / "run", train_dataset=data, batch_size=4 // processes, gradient_accumulation_steps=1
    )
    jobs = start_ranks(start, words, processes)
    assert [job.end() for job in jobs] == [0] * processes, [job.said() for job in jobs]
    assert [job.said() for job in jobs[1:]] == [""]
    check_follows(tmp_path / "run", one, 1e-4)
    assert not (tmp_path / "run/.dataset").exists()


def lose(file):
    """Move what the second process wrote away, as if that were another machine's disk."""
    wait = World.wait

    def lose_and_wait(world):
        if world.rank == 1 and file.exists():
            file.rename(file.with_name("elsewhere"))
        wait(world)

    World.wait = lose_and_wait


def test_processes_that_do_not_share_the_folder_are_told(place, tmp_path, start):
    file = tmp_path / "run/.dataset/features/0-1"
    jobs = start_ranks(start, command(place, tmp_path / "run"), 2, partial(lose, file))
    assert [job.end() for job in jobs] == [1, 1]
    assert f"{file}: not here as another process wrote it" in jobs[0].said()


@pytest.mark.parametrize("place_of", [0, 100, -1], ids=["first", "middle", "last"])
def test_features_that_change_on_the_disk_are_noticed(place, tmp_path, monkeypatch, place_of):
    """One bit of one of the files, after all are written and before any is read."""
    real = FeatureCache.precomputed

    def spoil(self, dataset, model):
        kept = real(self, dataset, model)
        file = tmp_path / "run/.dataset/features/0-0"
        content = bytearray(file.read_bytes())
        content[place_of % (len(content) - 4 * ROWS)] ^= 64
        with file.open("r+b") as opened:
            opened.write(content)
        return kept

    monkeypatch.setattr(FeatureCache, "precomputed", spoil)
    with pytest.raises(DatasetError, match=r"audio features of line \d+: changed on the disk"):
        train(options_of(place, tmp_path / "run", eval_dataset=None))


# --- refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_weights(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(training, "load_model", fail)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (("encoder",), "encoder"),
        (("decoder", "projector"), "projector"),
        (("encoder", "projector", "decoder"), "encoder, projector"),
    ],
)
def test_what_is_trained_cannot_be_kept(place, tmp_path, targets, named):
    """Said before anything is read: the data are not even there."""
    options = options_of(place, tmp_path / "run", train_target=targets, train_dataset=tmp_path / "none.csv")
    with pytest.raises(UsageError) as caught:
        train(options)
    assert caught.value.message.en == (
        f"--cache-audio-features: what {named} gives changes while it is trained; leave the option out, or "
        f"take {named} out of --train-target"
    )
    assert caught.value.message.zh == (
        f"--cache-audio-features：{named} 是训练目标，其输出会随训练改变；请去掉该选项，"
        f"或从 --train-target 中去掉 {named}"
    )
    assert not (tmp_path / "run").exists()


def bytes_needed(dtype_bytes):
    """From the recordings: 5 tokens a second of 64 numbers, the hidden size, and 4 bytes of checksum each."""
    lengths = [LENGTHS[row % 6] for row in range(ROWS)] + [LENGTHS[row % 6] for row in range(EVAL_ROWS)]
    return sum((1 + samples // 160) // 20 for samples in lengths) * 64 * dtype_bytes + 4 * len(lengths)


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize(("bf16", "dtype_bytes"), [(False, 4), (True, 2)])
def test_the_size_is_estimated_before_weights_are_loaded(place, tmp_path, monkeypatch, bf16, dtype_bytes):
    needed = bytes_needed(dtype_bytes)
    monkeypatch.setattr(features, "size", lambda size: f"{size} B")
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError) as caught:
        train(options_of(place, tmp_path / "run", bf16=bf16))
    folder = tmp_path / "run/.dataset/features"
    assert caught.value.message.en == (
        f"audio features: {needed} B in {folder}, where {needed - 1} B are free; make room, or leave "
        "--cache-audio-features out"
    )
    assert caught.value.message.zh == (
        f"音频特征：需要 {needed} B，保存在 {folder}（可用空间 {needed - 1} B）；空间不足，请清理磁盘，"
        "或去掉 --cache-audio-features"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_the_estimate_is_what_is_written(place, tmp_path, monkeypatch, capsys, bf16):
    written, real = [], FeatureCache.precomputed

    def featured(self, dataset, model):
        done = real(self, dataset, model)
        files = (tmp_path / "run/.dataset/features").iterdir()
        written[:] = [file.stat().st_size for file in files]
        return done

    monkeypatch.setattr(FeatureCache, "precomputed", featured)
    monkeypatch.setattr(features, "size", lambda size: f"{size} B")
    train(options_of(place, tmp_path / "run", bf16=bf16))
    assert sum(written) == bytes_needed(2 if bf16 else 4)
    assert f"audio features: {sum(written)} B in " in capsys.readouterr().err


def test_a_disk_that_fills_up_meanwhile(place, tmp_path, monkeypatch):
    real = FeatureCache.precomputed

    def featured(self, dataset, model):
        (tmp_path / "run/.dataset/features/0-0").symlink_to("/dev/full")
        return real(self, dataset, model)

    monkeypatch.setattr(FeatureCache, "precomputed", featured)
    with pytest.raises(DatasetError, match="features: cannot be written: No space left on device"):
        train(options_of(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("epochs", [0.5, 1])
def test_where_nothing_is_read_twice_the_option_is_ignored(place, tmp_path, capsys, epochs):
    train(options_of(place, tmp_path / "run", num_epochs=epochs, eval_dataset=None, eval_steps=500))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "warning: every row is computed only once: --cache-audio-features ignored" in said


def test_a_run_may_go_on_with_the_option_changed(place, tmp_path, capsys):
    """It changes no loss, so that nothing is said of it."""
    shutil.copytree(place / "plain", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    assert len(checkpoints(tmp_path / "run")) == 1
    train(options_of(place, tmp_path / "run", resume_from_checkpoint=True))
    assert "options differ" not in capsys.readouterr().err
