"""Steps and tokens of models of the published shapes, on a pretended GPU that computes shapes alone."""

import pytest
import torch
from benchmarks.gpu_model import config_of, random_model
from benchmarks.roofline import BANDWIDTHS

from mdl_toolkit.model.decoding_batch import DecodingBatch
from mdl_toolkit.utils.device import peak_of
from tests.support.pretended_device import pretending
from tests.support.pretended_models import DEVICE, a_step

GB = 10**9
BF16, F32 = torch.bfloat16, torch.float32
CASES = [
    ("7B", [30.0] * 8, BF16, 40, {}),
    ("7B", [30.0, 25.0, 20.0, 12.0, 8.0, 5.0, 3.0, 1.0], BF16, 24, {}),
    ("7B", [10.0] * 8, BF16, 24, {"quantization": "4bit"}),
    ("7B", [10.0] * 2, F32, 80, {"gradient_checkpointing": False}),
    ("0.6B", [10.0] * 8, BF16, 24, {}),
]


@pytest.mark.parametrize(("shape", "seconds", "dtype", "total", "changes"), CASES, ids=str)
def test_a_step_takes_the_memory_that_was_planned_and_one_wait(
    tmp_path, shape, seconds, dtype, total, changes
):
    with a_step(tmp_path, shape, seconds, dtype, total=total * GB, **changes) as found:
        assert found.plan.total <= total * GB
        assert found.device.peak == pytest.approx(found.plan.total, rel=0.05)
        # The loss and the norm of the gradient, together.
        assert found.device.waits == {"copy to the host": 1}
        assert found.device.copied == 8
        # A norm is one operation; 60 blocks have 5,700 to 6,500 in all, bitsandbytes' 4-bit layers 8,600.
        operations, norms = found.device.operations, {"7B": 2, "0.6B": 4}[shape] * 28 + 1
        assert operations["aten::_fused_rms_norm_backward"] == norms
        # Gradients of attention's padding are not added up, block by block.
        assert operations["aten::index_add"] < 10
        assert sum(operations.values()) < (9000 if "quantization" in changes else 6600)
        lower, higher = (found.device.products[each] for each in (BF16, F32))
        assert higher < 1e-4 * lower if dtype == BF16 else lower == 0
        # The README's speeds. 4-bit layers are one operation on a CPU, whose products are not seen.
        for card, bandwidth in BANDWIDTHS.items():
            least = found.device.least_seconds(peak_of(card), bandwidth)
            if dtype == BF16 and not changes:
                assert found.work.seconds(card, found.again) == pytest.approx(least, rel=0.15)


@pytest.mark.parametrize(
    ("targets", "rows", "changes"),
    [
        (
            ("encoder", "projector", "decoder", "embed_tokens", "lm_head"),
            16,
            {"batch_size": 8, "gradient_accumulation_steps": 2},
        ),
        (("lm_head",), 8, {}),
    ],
    ids=["with adapters, gradients of an earlier batch", "the head alone"],
)
def test_full_copies_take_the_memory_that_was_planned(tmp_path, targets, rows, changes):
    with a_step(tmp_path, "7B", [10.0] * rows, BF16, total=48 * GB, train_target=targets, **changes) as found:
        assert found.device.peak == pytest.approx(found.plan.total, rel=0.05)
        # No gradient goes through a frozen decoder.
        assert ("aten::silu_backward" in found.device.operations) == ("decoder" in targets)


def test_a_token_makes_nobody_wait_and_its_operations_are_few():
    with pretending(is_dry=True) as device:
        config, where = config_of("7B"), torch.device(DEVICE)
        model = random_model(config, BF16, where)
        batch = DecodingBatch(model.decoder)
        embeddings = torch.zeros(16, 200, 3584, dtype=BF16, device=where)
        batch.admit(embeddings, [200 - each for each in range(16)], 16, 300)
        ids = torch.zeros(16, dtype=torch.int64, device=where)
        device.forget()
        batch.step(ids)
        assert not device.waits
        # 26 of each of the 28 layers.
        assert sum(device.operations.values()) < 760
        assert device.products[torch.float32] < 1e-3 * device.products[BF16]
