"""The score of a choice, computed as plainly as can be: one token after another, nothing shared."""

import torch

from mdl_toolkit.data.collate import collate_prompts
from mdl_toolkit.inference.generate import embed_prompts
from mdl_toolkit.model.decoding_batch import DecodingBatch


def scored_slowly(model, question, choice):
    """Return the sum of the log-probabilities of a choice's tokens after the prompt."""
    total, ids = 0.0, []
    for token in choice:
        single = DecodingBatch(model.decoder)
        with torch.inference_mode():
            x = embed_prompts(model, collate_prompts([question.sample], 0))
            if ids:
                x = torch.cat([x, model.decoder.model.embed_tokens(torch.tensor([ids]))], 1)
            logits = single.admit(x, [x.shape[1]], 1, 0)
        total += logits[0].log_softmax(-1)[token].item()
        ids.append(token)
    return total
