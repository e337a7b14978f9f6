"""The recipe: each option does what the libraries mean by it, and nothing changes without it."""

import shutil
from contextlib import nullcontext
from dataclasses import replace

import bitsandbytes
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import get_scheduler

from mdl_toolkit.data.collate import Collator
from mdl_toolkit.data.dataset import ConvertedDataset
from mdl_toolkit.errors import ModelError, UsageError
from mdl_toolkit.training.optimization.optimizer import OptimizerConfig, check_tied_rates, saved_state
from mdl_toolkit.training.run import train, trainable_model
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.utils.run_folder import read_log
from tests.support.lora_models import adapted, batch_of
from tests.support.paths import MODEL
from tests.support.runs import convert, make_csv, train_options

CPU = torch.device("cpu")
# The head has enough numbers for 8-bit states.
TARGETS = ("encoder", "decoder", "lm_head")
RECIPES = {
    "as ever": {},
    "weight decay": {"weight_decay": 0.5},
    "beta2": {"adam_beta2": 0.9},
    "little clipping": {"max_grad_norm": 100},
    "much clipping": {"max_grad_norm": 0.01},
    "no clipping": {"max_grad_norm": 0},
    "cosine": {"lr_scheduler": "cosine", "warmup_steps": 2},
    "a share for the warm-up": {"lr_scheduler": "inverse_sqrt", "warmup_ratio": 0.3},
    "steps": {"max_steps": 3},
    "more steps than epochs": {"max_steps": 5},
    "label smoothing": {"label_smoothing": 0.2},
    "8 bit": {"optimizer": "adamw_8bit", "weight_decay": 0.1},
    "a rate for each tower": {"lr": {"encoder": 0.002, "decoder": 0.01, "lm_head": 0.001}},
    "a rate for one tower": {"lr": ("0.01", "encoder=0.03")},
    "LoRA+": {"lora_plus_ratio": 4},
    "paged, which a CPU is not": {"optimizer": "paged_adamw_8bit"},
}


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return make_csv(tmp_path_factory.mktemp("data"), 8)


def options_of(csv, output, **changes):
    """Four steps."""
    settings = {"train_target": TARGETS, "merge_lora": False, "num_epochs": 2, "seed": 3}
    return train_options(csv, MODEL, output, **{**settings, **changes})


def rate_by_hand(name, options):
    words = options.lr if isinstance(options.lr, tuple) else (f"={options.lr}",)
    rates = {target: float(rate) for target, _, rate in (word.rpartition("=") for word in words)}
    tower = "encoder" if ".audio_encoder." in name else "lm_head" if ".lm_head." in name else "decoder"
    return rates.get(tower, rates.get("")) * (options.lora_plus_ratio if "lora_B" in name else 1)


def trained_by_hand(csv, folder, options, steps, warmup):
    """A loop of torch's parts and nothing else; its parameters and losses."""
    data = ConvertedDataset(convert(csv, MODEL, folder / "data"))
    sampler = BatchSampler(data.token_counts, data.supervised_counts, 4, 1, 1, options.seed)
    model, _ = trainable_model(options, MODEL, CPU, torch.float32)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = {"betas": (0.9, options.adam_beta2), "weight_decay": options.weight_decay}
    groups = [{"params": [p], "lr": rate_by_hand(name, options)} for name, p in named.items()]
    if options.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    else:
        optimizer = bitsandbytes.optim.AdamW8bit(groups, **settings)
    scheduler = get_scheduler(options.lr_scheduler, optimizer, warmup, steps)
    model.train()
    losses = []
    for step in range(steps):
        batch = Collator(0)([data[int(index)] for index in sampler.examples(step)])
        loss = model(**batch, num_items_in_batch=sampler.tokens(step)).loss
        loss.backward()
        if options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(named.values(), options.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return named, losses


def adapter_of(output, step):
    return load_file(output / f"checkpoint-{step}/adapter_model.safetensors")


def as_saved(named):
    """Parameters under the names of PEFT's files."""
    return {
        name.replace(".modules_to_save.default", "").replace(".default", ""): p.detach()
        for name, p in named.items()
    }


@pytest.fixture(scope="module")
def plain(csv, tmp_path_factory):
    """The adapter of a run without options."""
    output = tmp_path_factory.mktemp("plain") / "run"
    return adapter_of(output, train(options_of(csv, output)).steps)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_is_the_loop_that_its_options_describe(csv, plain, tmp_path, recipe):
    """Bit for bit; and without them it is the loop that it has always been."""
    options = options_of(csv, tmp_path / "run", **RECIPES[recipe])
    steps = options.max_steps or 4
    named, losses = trained_by_hand(csv, tmp_path, options, steps, {"cosine": 2, "inverse_sqrt": 2}.get(
        options.lr_scheduler, 0
    ))  # fmt: skip
    assert train(options).steps == steps
    logged = [line["loss"] for line in read_log(tmp_path / "run/log.jsonl") if "loss" in line]
    assert logged == pytest.approx(losses, rel=1e-6)
    ours, theirs = adapter_of(tmp_path / "run", steps), as_saved(named)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (recipe == "as ever") == all(torch.equal(tensor, plain[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "changes",
    [
        {
            "lr_scheduler": "cosine", "warmup_ratio": 0.3, "weight_decay": 0.1, "max_grad_norm": 0.5,
            "adam_beta2": 0.95, "label_smoothing": 0.1, "max_steps": 5, "lora_dropout": 0.1,
        },
        {"optimizer": "adamw_8bit", "lr_scheduler": "constant_with_warmup", "warmup_steps": 3},
    ],
    ids=["all", "8 bit"],
)  # fmt: skip
def test_a_resumed_run_ends_as_the_unbroken_one_bit_for_bit(csv, tmp_path, changes):
    options = options_of(csv, tmp_path / "run", save_steps=1, **changes)
    last = train(options).steps
    (tmp_path / "again").mkdir()
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "again/checkpoint-2")
    train(replace(options, output=str(tmp_path / "again"), resume_from_checkpoint=True))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        whole, resumed = (
            (tmp_path / run / f"checkpoint-{last}" / name).read_bytes() for run in ("run", "again")
        )
        assert whole == resumed


def test_another_optimizer_does_not_go_on_with_a_state(csv, tmp_path):
    options = options_of(csv, tmp_path / "run", max_steps=1)
    train(options)
    again = replace(options, optimizer="adamw_8bit", resume_from_checkpoint=True, max_steps=2)
    with pytest.raises(ModelError, match="it was trained with --optimizer adamw; give the same"):
        train(again)


def test_8_bit_needs_its_package(csv, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"--optimizer adamw_8bit needs .*mdl-toolkit\[quantization\]"):
        train(options_of(csv, tmp_path / "run", optimizer="adamw_8bit"))


@pytest.mark.parametrize(
    "targets", [("decoder",), ("decoder", "lm_head")], ids=["frozen head", "trained head"]
)
def test_smoothed_labels_are_torchs_in_training_and_none_in_evaluation(golden, targets):
    model = adapted(golden, "A-small", targets)
    model.get_base_model().label_smoothing = 0.3
    batch = batch_of(model)
    with torch.no_grad():
        logits = model(**{name: each for name, each in batch.items() if name != "labels"}).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    for mode, smoothing in ((True, 0.3), (False, 0.0)):
        expected = torch.nn.functional.cross_entropy(logits.mT, targets, label_smoothing=smoothing)
        assert model.train(mode)(**batch).loss.item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_the_states_are_as_large_as_predicted(name):
    sizes = (4095, 4096, 10_000, 64)
    named = {str(size): torch.nn.Parameter(torch.randn(size)) for size in sizes}
    optimizer = OptimizerConfig(name).make(named, CPU)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = [t for key, t in saved_state(optimizer, named).items() if not key.endswith("/step")]
    assert OptimizerConfig(name).state_bytes(sizes) == sum(tensor.nbytes for tensor in states)
    assert (sum(tensor.nbytes for tensor in states) < 3 * sum(sizes) + 6 * 4096) == (name != "adamw")


def test_lora_plus_is_that_of_peft(golden):
    targets = ("encoder", "projector", "decoder")
    model = adapted(golden, "A-small", targets)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=3e-4, loraplus_lr_ratio=16)
    expected = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    options = options_of(
        "d", "o", lr=3e-4, lora_plus_ratio=16, train_target=("encoder", "projector", "decoder")
    )
    ours = OptimizerConfig.of(options).make(named, CPU)
    found = {id(p): group["lr"] for group in ours.param_groups for p in group["params"]}
    assert found.keys() == {id(p) for p in named.values()}
    assert found == {key: expected[key] for key in found}
    assert len({*found.values()}) == 2


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ({"decoder": 1, "lm_head": 1}, "--lr: no learning rate for encoder; give TARGET=X"),
        ({"decoder": 1, "": 1, "projector": 1}, "--lr: projector: not among the --train-target of this run"),
    ],
)
def test_rates_that_do_not_fit_the_targets_are_named(csv, tmp_path, rates, told):
    words = tuple(f"{target}={rate}".removeprefix("=") for target, rate in rates.items())
    with pytest.raises(UsageError, match=told):
        train(options_of(csv, tmp_path / "run", lr=words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings_have_the_rate_of_the_one_that_is_named(golden, target):
    model = adapted(golden, "B-small-tied", ("decoder", target))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options = options_of("d", "o", train_target=("decoder", target), lr={"decoder": 0.1, target: 0.2})
    groups = OptimizerConfig.of(options).make(named, CPU).param_groups
    assert {group["lr"]: len(group["params"]) for group in groups} == {0.1: len(named) - 1, 0.2: 1}


@pytest.mark.parametrize("name", ["B-small", "B-small-tied"])
def test_two_rates_of_one_matrix_are_refused(golden, csv, tmp_path, name):
    model = str(golden / "checkpoints" / name)
    both = {"model_name": model, "train_target": ("embed_tokens", "lm_head")}
    options = options_of(csv, tmp_path / "run", **both, lr=("embed_tokens=0.1", "lm_head=0.2"))
    told = pytest.raises(
        UsageError, match=r"--lr: embed_tokens / lm_head are one matrix in .*tied; give both"
    )
    with told if "tied" in name else nullcontext():
        check_tied_rates(options)
    if "tied" in name:
        with pytest.raises(UsageError, match="one matrix"):
            train(options)
        assert not (tmp_path / "run").exists()
    check_tied_rates(replace(options, lr=("embed_tokens=0.1", "0.1")))
