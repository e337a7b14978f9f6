"""What a training is predicted to need, against what it does need; and what is free."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.data.collate import Collator
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.model import MiDashengLMConfig, MiDashengLMModel
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.training.gradient_checkpointing import KeptBlocks, checkpoint_gradients
from mdl_toolkit.training.lora import add_adapters
from mdl_toolkit.training.memory import plan as memory_room
from mdl_toolkit.training.memory.plan import MemoryPlan, plan_memory
from mdl_toolkit.training.sampler import BatchSampler
from mdl_toolkit.training.step import TrainableState
from mdl_toolkit.utils import machine as free_memory_room
from mdl_toolkit.utils.machine import free_memory
from mdl_toolkit.weights.loading import load_model
from tests.support.memory import peak_bytes

CPU = torch.device("cpu")
LORA = ("encoder", "projector", "decoder")
SECONDS = (4, 3, 3, 2)
BEGINNING = 80  # words that all rows have in common
GB = 10**9


@pytest.fixture(scope="module")
def base(golden, tmp_path_factory):
    """A random model large enough that its layers need more than the front end."""
    config = json.loads((golden / "checkpoints/A-small/config.json").read_text(encoding="utf-8"))
    config["audio_encoder_config"] |= {"embed_dim": 128, "depth": 6}
    config["text_config"] |= {
        "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 4, "vocab_size": 8192, "layer_types": ["full_attention"] * 6,
        "rope_scaling": None,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    MiDashengLMModel(MiDashengLMConfig(**config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(base):
    """Audio in front, then as many words to learn as there are seconds, times ten."""
    audio = json.loads((base / "config.json").read_text(encoding="utf-8"))["audio_token_id"]
    found = []
    for seconds in SECONDS:
        answer = [3] * 10 * seconds
        ids = np.array([1] * BEGINNING + [audio] * audio_token_count(16_000 * seconds) + answer)
        labels = np.where(np.arange(len(ids)) < len(ids) - len(answer), -100, ids)
        noise = np.random.default_rng(seconds).normal(0, 0.1, 16_000 * seconds).astype(np.float32)
        found.append(Sample(ids, labels, noise))
    return found


def options_of(**changes):
    settings = {
        "train_dataset": "data", "output": "run", "train_target": LORA, "lora_rank": 8, "batch_size": 4,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    return TrainOptions(**{**settings, **changes})


def plan(base, rows, options, dtype=torch.float32, processes=1):
    lengths = np.array([len(row.input_ids) for row in rows])
    supervised = np.array([int((row.labels != -100).sum()) for row in rows])
    samples = np.array([len(row.waveform) for row in rows])
    accumulation = options.gradient_accumulation_steps
    sampler = BatchSampler(lengths, supervised, options.batch_size, accumulation, processes, 0)
    return plan_memory(base, options, sampler, samples, BEGINNING, CPU, dtype)


def adapted(base, options, dtype, kept):
    model = load_model(base, dtype=dtype, device=CPU, quantization=options.quantization)
    wrapped, _ = add_adapters(
        model, options.train_target, rank=options.lora_rank, alpha=8.0, dropout=options.lora_dropout,
        variant=options.lora_variant, base_name="",
    )  # fmt: skip
    if options.gradient_checkpointing:
        checkpoint_gradients(wrapped, kept)
    return wrapped.train()


def step(model, trained, batch, dtype):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    trained.clip(1.0)
    trained.update(1e-4)


# --- predicted against measured --------------------------------------------------------------------------


F32, BF16 = torch.float32, torch.bfloat16
STEPS = [
    ({}, F32), ({}, BF16),
    ({"train_target": ("decoder",)}, F32),
    ({"train_target": (*LORA, "lm_head")}, BF16),
    ({"train_target": (*LORA, "embed_tokens")}, F32),
    ({"quantization": "4bit"}, BF16),
    ({"quantization": "8bit"}, F32),
    ({"lora_dropout": 0.1}, F32),
    ({"lora_variant": "dora"}, F32), ({"lora_variant": "dora"}, BF16),
]  # fmt: skip


def has_free(monkeypatch, count):
    monkeypatch.setattr(memory_room, "free_memory", lambda _: count)


def leaves_room(monkeypatch, base, rows, options, dtype, share):
    """As much is free as lets gradient checkpointing keep a share of the activations that it gives up."""
    has_free(monkeypatch, None)
    needs = [
        plan(base, rows, replace(options, gradient_checkpointing=checkpointing), dtype).total
        for checkpointing in (True, False)
    ]
    has_free(monkeypatch, needs[0] + int(share * (needs[1] - needs[0]) / memory_room.KEPT_SHARE))


@pytest.mark.parametrize("keeps", [None, 0.0, 0.4, 0.8])  # a share of the activations; all
@pytest.mark.parametrize(("changes", "dtype"), STEPS, ids=str)
def test_a_step_needs_what_was_predicted_within_a_quarter(base, rows, changes, dtype, keeps, monkeypatch):
    options = options_of(gradient_checkpointing=keeps is not None, **changes)
    leaves_room(monkeypatch, base, rows, options, dtype, keeps or 0.0)
    found = plan(base, rows, options, dtype)
    model, batch = adapted(base, options, dtype, found.kept), Collator(0)(rows)
    trained = TrainableState(model, CPU)
    step(model, trained, batch, dtype)  # makes the optimizer's states
    measured = peak_bytes(lambda: step(model, trained, batch, dtype))
    assert found.activations + found.gradients == pytest.approx(measured, rel=0.25)
    states = [t for n, t in trained.optimizer_state().items() if not n.endswith("/step")]
    assert found.optimizer == sum(tensor.nbytes for tensor in states)
    assert found.adapters == found.gradients == sum(p.nbytes for p in trained.parameters)


# --- what gradient checkpointing keeps ---------------------------------------------------------------------


def test_what_fits_into_a_quarter_of_what_is_left_is_kept(base, rows, monkeypatch):
    options = options_of(gradient_checkpointing=True)
    kept, needs, shares = [], [], (0.0, 0.3, 0.6, 1.01)
    for share in shares:
        leaves_room(monkeypatch, base, rows, options, F32, share)
        found = plan(base, rows, options)
        kept.append(found.kept)
        needs.append(found.total)
    assert kept[0] in (
        KeptBlocks(),
        KeptBlocks(0, 1),
    )  # the last layer is needed at once: to keep it costs nothing
    assert kept[-1] == KeptBlocks(6, 6)
    assert 0 < kept[1].decoder < kept[2].decoder <= 6
    has_free(monkeypatch, None)
    least, most = plan(base, rows, options).total, needs[-1]  # nothing kept, and everything
    assert most == plan(base, rows, options_of(gradient_checkpointing=False)).total
    assert all(
        need <= least + share * (most - least) for need, share in zip(needs, (0, 0.3, 0.6, 1.01), strict=True)
    )


def test_nothing_that_costs_is_kept_where_too_little_is_free_or_nobody_knows(base, rows, monkeypatch):
    found = []
    for free in (None, 0, 10**6):
        has_free(monkeypatch, free)
        found.append(plan(base, rows, options_of(gradient_checkpointing=True)))
    assert max(each.total for each in found) == found[0].total
    assert found[0].kept == KeptBlocks()
    assert all(each.kept in (KeptBlocks(), KeptBlocks(0, 1)) for each in found)


def held(model):
    """Bytes of weights, and of what bitsandbytes keeps beside them."""
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    total = sum(tensors.values())
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner = state.state2
            parts = (state.absmax, state.code, state.offset, inner.absmax, inner.code)
            total += sum(t.nbytes for t in parts)
        elif getattr(parameter, "SCB", None) is not None:
            total += parameter.SCB.nbytes
    return total


@pytest.mark.parametrize("name", ["A-small", "B-small", "B-small-tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [None, "4bit", "8bit"])
def test_weights_are_those_of_the_loaded_model(golden, rows, name, dtype, quantization):
    folder = golden / "checkpoints" / name
    model = load_model(folder, dtype=dtype, device=CPU, quantization=quantization)
    found = plan(folder, rows, options_of(quantization=quantization), dtype)
    assert found.weights == pytest.approx(held(model), rel=1e-3)


def test_earlier_gradients_of_an_accumulated_step_are_counted(base, rows):
    once = plan(base, rows, options_of())
    twice = plan(base, rows, options_of(batch_size=2, gradient_accumulation_steps=2))
    assert twice.activations < once.activations
    alone = plan(base, rows[:2], options_of(batch_size=2))
    assert twice.activations > alone.activations


# --- what is free ----------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine of files: 8 GB available, in the cgroup /a/b, without limits."""
    monkeypatch.setattr(free_memory_room, "PROC", tmp_path / "proc")
    monkeypatch.setattr(free_memory_room, "CGROUP", tmp_path / "cgroup")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    write(tmp_path / "proc/meminfo", "MemTotal: 16000000 kB\nMemAvailable: 7812500 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def limit(folder, most, used, cached=0):
    write(folder / "memory.max", f"{most}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 1\ninactive_file {cached}\n")


def test_free_is_what_the_system_calls_available(system):
    assert free_memory(CPU) == 8 * GB
    limit(system / "cgroup/a/b", "max", GB)
    assert free_memory(CPU) == 8 * GB


@pytest.mark.parametrize("folder", ["a/b", "a", "."])
def test_a_cgroup_limit_counts_also_of_one_around(system, folder):
    limit(system / "cgroup" / folder, 5 * GB, 3 * GB, cached=GB)
    assert free_memory(CPU) == 3 * GB


def test_version_1_of_cgroups(system):
    write(system / "proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/a\n")
    folder = system / "cgroup/memory/a"
    write(folder / "memory.limit_in_bytes", str(4 * GB))
    write(folder / "memory.usage_in_bytes", str(GB))
    write(folder / "memory.stat", "inactive_file 7\ntotal_inactive_file 0\n")
    assert free_memory(CPU) == 3 * GB


def test_processes_of_one_machine_share(system, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == 2 * GB


def test_where_nothing_tells_it_nothing_is_said(system):
    (system / "proc/meminfo").unlink()
    assert free_memory(CPU) is None


def test_a_gpu_is_asked_itself(monkeypatch):
    assert free_memory(torch.device("cuda", 0)) is None  # there is none here
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * GB, 24 * GB))
    assert free_memory(torch.device("cuda", 0)) == 3 * GB


# --- what is said ----------------------------------------------------------------------------------------

PLAN = MemoryPlan(
    5 * GB, 10**8, 10**8, 2 * 10**8, 9 * GB, None,
    (("activations", "--a"), ("activations", "--b"), ("weights", "--c"), ("trained", "--d")),
)  # fmt: skip


def test_the_lines_in_both_languages():
    (first,) = replace(PLAN, free=20 * GB).lines()
    assert first.en == (
        "memory predicted: 14.4 GB (weights 5.0 GB, adapters and optimizer 400 MB, activations 9.0 GB); "
        "free: 20.0 GB"
    )
    assert first.zh == "预计占用：14.4 GB（权重 5.0 GB，适配器与优化器 400 MB，激活值 9.0 GB）；可用 20.0 GB"
    assert "free" not in PLAN.lines()[0].en


def test_it_says_what_is_computed_again():
    assert len(PLAN.lines()) == 1
    line = replace(PLAN, blocks=KeptBlocks(32, 28), kept=KeptBlocks(0, 25)).lines()[1]
    assert line.en == "gradient checkpointing computes again: encoder blocks 32/32, decoder layers 3/28"
    assert line.zh == "梯度检查点将重新计算：编码器 32/32 块，解码器 3/28 层"


def test_the_warning_names_what_lowers_the_largest_share_first():
    warning = replace(PLAN, free=10 * GB).warning()
    assert warning.en == "memory may not suffice: 14.4 GB predicted, 10.0 GB free; try --a, or --b, or --c"
    assert warning.zh == "内存或显存可能不足：预计需要 14.4 GB，可用 10.0 GB；可尝试 --a，或 --b，或 --c"
    assert PLAN.warning() is None
    assert replace(PLAN, free=PLAN.total).warning() is None


def test_remedies_are_those_that_are_not_yet_taken(base, rows):
    all_of_them = options_of(gradient_checkpointing=False, lora_rank=32, train_target=("decoder", "lm_head"))
    assert [words for _, words in plan(base, rows, all_of_them).remedies] == [
        "--gradient-checkpointing true", "--batch-size 2 --gradient-accumulation-steps 2",
        "--quantization 4bit", "--train-target (- lm_head)", "--lora-rank 8",
    ]  # fmt: skip
    # An adapter that training goes on from has its rank and targets.
    going_on = plan(base, rows, replace(all_of_them, adapter="start")).remedies
    assert not {"trained"} & {figure for figure, _ in going_on}
    assert going_on
    # Neither is one that training refuses.
    pissa = plan(base, rows, replace(all_of_them, lora_variant="pissa")).remedies
    assert "--batch-size 2 --gradient-accumulation-steps 2" in [words for _, words in pissa]
    assert "--quantization 4bit" not in [words for _, words in pissa]
    for metric, is_offered in ((None, True), ("accuracy", False)):
        shared = plan(base, rows, replace(all_of_them, eval_metric=metric), processes=2).remedies
        assert ("--shard-weights true" in [words for _, words in shared]) == is_offered
    none = options_of(gradient_checkpointing=True, batch_size=1, quantization="4bit")
    assert plan(base, rows, none).remedies == ()
