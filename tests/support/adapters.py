"""Adapters made without a training: by PEFT alone, and by the toolkit."""

import torch
from peft import LoraConfig, get_peft_model

from mdl_toolkit.training.lora import add_adapters
from mdl_toolkit.weights.loading import load_model, quiet_peft

ALL = ("encoder", "projector", "decoder", "embed_tokens", "lm_head")


def adapted(base, folder, dtype=torch.float32, seed=0, **config):
    """Save an adapter as PEFT writes it, with no weight that is zero, and return the model with it."""
    torch.manual_seed(seed)
    model = load_model(base, dtype=dtype, device=torch.device("cpu"))
    with quiet_peft():
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def make_adapter(base, folder, targets=ALL, *, alpha=6.0, rank=4):
    """Save an adapter of the toolkit's with no weight that is zero, and return its folder."""
    torch.manual_seed(0)
    model, _ = add_adapters(
        load_model(base, dtype=torch.float32, device=torch.device("cpu")),
        targets,
        rank=rank,
        alpha=alpha,
        dropout=0.0,
        base_name=str(base),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
