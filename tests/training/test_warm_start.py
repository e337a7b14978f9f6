"""`--adapter`: a training that goes on from an adapter, ours or PEFT's."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mdl_toolkit.cli import main as cli
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import from_mapping, read_settings
from mdl_toolkit.errors import InputError, ModelError, UsageError
from mdl_toolkit.training.run import train, trainable_model
from mdl_toolkit.training.warm_start import take_over
from mdl_toolkit.utils.run_folder import read_log
from mdl_toolkit.weights.loading import load_model, quiet_peft
from mdl_toolkit.weights.provenance import read_provenance
from tests.support.adapters import adapted, make_adapter
from tests.support.lora_models import batch_of, learnt
from tests.support.paths import MODEL
from tests.support.runs import copy_checkpoint, make_csv, train_options

CPU = torch.device("cpu")
# Adapters as PEFT makes them, and what they train in our words.
OTHERS = {
    "some of a part's layers": ({"target_modules": ["q_proj", "v_proj"]}, ("decoder",)),
    "ranks and scales of their own": (
        {
            "target_modules": ["qkv", "fc1", "o_proj"],
            "rank_pattern": {"fc1": 2},
            "alpha_pattern": {"o_proj": 1},
        },
        ("encoder", "decoder"),
    ),
    "scaled by the root of the rank": ({"target_modules": ["gate_proj", "qkv"], "use_rslora": True}, None),
    "DoRA": ({"target_modules": ["down_proj", r"fc2", "k_proj"], "use_dora": True}, ("encoder", "decoder")),
    "a full copy": (
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
        ("decoder", "lm_head"),
    ),
}


def options_of(tmp_path, adapter, **changes):
    """Options that say nothing of what the adapter knows."""
    settings = {
        "train_dataset": str(tmp_path / "train.csv"), "output": str(tmp_path / "run"),
        "adapter": str(adapter), "lr": 1e-2, "batch_size": 4, "gradient_checkpointing": False,
    }  # fmt: skip
    return TrainOptions(**{**settings, **changes})


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_start_is_what_peft_loads(tmp_path, kind):
    """The same parameters train, from the same numbers, and the loss and its gradients are the same."""
    config, targets = OTHERS[kind]
    adapted(MODEL, tmp_path / "adapter", **config)
    options, folder = take_over(options_of(tmp_path, tmp_path / "adapter"))
    assert (options.lora_rank, options.lora_alpha) == (4, 6)
    assert options.train_target == (targets or ("encoder", "decoder"))
    ours, counts = trainable_model(options, MODEL, CPU, torch.float32, folder)
    base = load_model(MODEL, dtype=torch.float32, device=CPU)
    with quiet_peft():
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True, torch_device="cpu")
    expected = parameters(theirs)
    assert parameters(ours).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(ours).items())
    assert sum(count.parameters for count in counts) == sum(map(torch.numel, expected.values()))
    batch = batch_of(theirs)
    (loss, gradients), (their_loss, their_gradients) = (
        learnt(each.train(), batch) for each in (ours, theirs)
    )
    assert loss == pytest.approx(their_loss, rel=1e-6)
    assert loss != pytest.approx(learnt(trainable_model(options, MODEL, CPU, torch.float32)[0], batch)[0])
    for name, gradient in gradients.items():
        assert (gradient - their_gradients[name]).norm() <= 1e-4 * their_gradients[name].norm() + 1e-9, name


@pytest.mark.parametrize(
    ("name", "targets"),
    [("A-small", ("encoder", "projector", "decoder")), ("B-small-tied", ("decoder", "lm_head"))],
)
@pytest.mark.parametrize("merge", [True, False])
def test_a_training_goes_on_from_one_of_ours(golden, tmp_path, capsys, name, targets, merge):
    model, csv = copy_checkpoint(golden, name, tmp_path), make_csv(tmp_path, 8)
    changes = {"train_target": targets, "num_epochs": 4, "merge_lora": False}
    train(train_options(csv, model, tmp_path / "first", **changes))
    checkpoint, adapter = tmp_path / "first/checkpoint-8", tmp_path / "first/final"
    options = options_of(tmp_path, adapter, lr=1e-12, merge_lora=merge)
    done = train(options)
    said = capsys.readouterr().err
    assert f"going on from the adapter {adapter}: rank 4, alpha 8, targets " in said
    losses = [line["loss"] for line in read_log(tmp_path / "first/log.jsonl") if "loss" in line]
    assert done.train_loss < losses[-1] < 0.9 * losses[0]
    # Hardly a step was made: it is the adapter that it began with.
    start, end = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "run/checkpoint-2")
    )
    assert start.keys() == end.keys()
    assert all(torch.allclose(tensor, end[key], atol=1e-9) for key, tensor in start.items())
    record = read_provenance(done.final)
    assert record.base == read_provenance(adapter).base
    assert record.adapter.name == str(adapter)
    assert "Training went on from an adapter" in (done.final / "README.md").read_text()
    settings = read_settings(tmp_path / "run/mdl-toolkit.yaml", TrainOptions)
    assert (settings["adapter"], settings["lora_rank"], settings["lora_alpha"]) == (str(adapter), 4, 8)
    # Tied embeddings are one matrix.
    assert {*settings["train_target"]} == {*targets, *(["embed_tokens"] if "tied" in name else [])}
    # A checkpoint is the same adapter.
    again = replace(options, adapter=str(checkpoint), output=str(tmp_path / "again"), merge_lora=False)
    assert read_provenance(train(again).final).adapter.fingerprint == record.adapter.fingerprint


def test_resumed_it_ends_as_unbroken_bit_for_bit(tmp_path):
    make_csv(tmp_path, 8)
    make_adapter(MODEL, tmp_path / "adapter", ("encoder", "decoder", "lm_head"))
    options = replace(
        options_of(tmp_path, tmp_path / "adapter"), num_epochs=2, save_steps=1, lora_dropout=0.1,
        merge_lora=False,
    )  # fmt: skip
    whole = train(options).final
    start = load_file(tmp_path / "adapter/adapter_model.safetensors")
    options = replace(options, output=str(tmp_path / "run2"))
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "run2/checkpoint-2")
    # Resumed from what the checkpoint holds, not from the adapter's own weights.
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in start.items()},
        tmp_path / "adapter/adapter_model.safetensors",
    )
    resumed = train(replace(options, resume_from_checkpoint=True)).final
    ours, theirs = ((folder / "adapter_model.safetensors").read_bytes() for folder in (whole, resumed))
    assert ours == theirs
    assert not torch.equal(
        next(iter(load_file(whole / "adapter_model.safetensors").values())), next(iter(start.values()))
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lora-rank", "8"], "--lora-rank: not as in --adapter {}, which has --lora-rank 4"),
        # Also where it is the default.
        (
            ["--lora-alpha", "32", "--lora-rank", "32", "--train-target", "encoder"],
            (
                "--lora-rank, --lora-alpha, --train-target: not as in --adapter {}, which has --lora-rank 4 "
                "--lora-alpha 6 --train-target encoder --train-target decoder"
            ),
        ),
    ],
)
def test_options_that_say_otherwise_are_named(tmp_path, capsys, words, told):
    make_csv(tmp_path, 2)
    make_adapter(MODEL, tmp_path / "adapter", ("encoder", "decoder"))
    files = ["--train-dataset", str(tmp_path / "train.csv"), "--output", str(tmp_path / "run")]
    assert cli.run(["train", *files, "--adapter", str(tmp_path / "adapter"), *words]) == 2
    assert told.format(tmp_path / "adapter") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_options_that_say_the_same_are_none(tmp_path):
    adapter = make_adapter(MODEL, tmp_path / "adapter", ("encoder", "decoder"))
    values = vars(options_of(tmp_path, adapter, lora_rank=4, train_target=("decoder", "encoder")))
    options, _ = take_over(from_mapping(TrainOptions, values, {"lora_rank", "lr"}))
    assert options.typed == {"lora_rank", "lr"}
    assert options.train_target == ("encoder", "decoder")


def test_a_base_that_is_not_its_own_is_refused_and_one_that_has_moved_can_be_named(golden, tmp_path):
    model = copy_checkpoint(golden, "A-small", tmp_path)
    make_csv(tmp_path, 4)
    train(train_options(tmp_path / "train.csv", model, tmp_path / "first", merge_lora=False))
    adapter = tmp_path / "first/final"
    with pytest.raises(ModelError, match="trained on .*A-small .*, and .*B-small .* has other weights"):
        take_over(options_of(tmp_path, adapter, model_name=str(golden / "checkpoints/B-small")))
    model.rename(tmp_path / "moved")
    unnamed = options_of(tmp_path, adapter)
    with pytest.raises(ModelError, match=r"its base model cannot be used .*A-small.*; say with --model-name"):
        take_over(unnamed)
    assert take_over(replace(unnamed, model_name=str(tmp_path / "moved")))[1] == adapter


def test_what_cannot_be_gone_on_from_is_refused(tmp_path):
    make_csv(tmp_path, 2)
    adapter = tmp_path / "adapter"
    adapted(MODEL, adapter, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ModelError, match=r"also trains decoder\.model\.embed_tokens, which"):
        train(options_of(tmp_path, adapter))
    with pytest.raises(ModelError, match="no adapter"):
        train(options_of(tmp_path, MODEL))
    shutil.rmtree(adapter)
    make_adapter(MODEL, adapter, ("decoder",))
    for output in (adapter, adapter / "run"):
        with pytest.raises(InputError, match="--output"):
            train(replace(options_of(tmp_path, adapter), output=str(output)))
    with pytest.raises(UsageError, match="--lora-rank: not as in"):
        train(options_of(tmp_path, adapter, lora_rank=5))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ModelError, match="peft_type IA3"):
        train(options_of(tmp_path, adapter))


def test_an_adapter_that_does_not_fit_is_refused(golden, tmp_path):
    make_csv(tmp_path, 2)
    adapter = make_adapter(MODEL, tmp_path / "adapter", ("decoder",))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, file)
    with pytest.raises(ModelError, match="the adapter does not fit its base"):
        train(options_of(tmp_path, adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for targets in (["q_lin"], "transformer.*"):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
        with pytest.raises(
            ModelError, match=r"target_modules fits no module decoder\.model.*copy the adapter"
        ):
            train(options_of(tmp_path, adapter))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    far = {key.replace("layers.0.", "layers.7."): tensor for key, tensor in tensors.items()}
    save_file(far, file)
    with pytest.raises(ModelError, match=r"A-small has no tensors decoder\.model\.layers\.7\."):
        train(options_of(tmp_path, adapter))
    assert not (tmp_path / "run").exists()
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(ModelError, match="only lora_B of"):
        train(options_of(tmp_path, adapter))
