"""An adapter that PEFT has made, without a training."""

import torch
from peft import LoraConfig, get_peft_model

from mdl_toolkit.weights.loading import load_model, quiet_peft


def adapted(base, folder, dtype=torch.float32, seed=0, **config):
    """An adapter as PEFT writes it, with weights that are not zero anywhere; the model itself."""
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
