"""Questions of noise for small models, and plain ways to answer them."""

import numpy as np
import torch

from mdl_toolkit.data.collate import collate_prompts
from mdl_toolkit.data.dataset import Sample
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.inference.generate import Answerer, Question, embed_prompts
from mdl_toolkit.model.decoding_batch import DecodingBatch
from mdl_toolkit.model.lengths import audio_token_count
from mdl_toolkit.weights.loading import load_model
from mdl_toolkit.weights.resolve import find_model
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files
from tests.support.waves import wave


def load_checkpoint(golden, name):
    folder = find_model(str(golden / "checkpoints" / name), from_modelscope=False, weights=True)
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu")).eval()
    model.generation_config.eos_token_id = None  # every row is answered to its budget
    return model, ChatTokenizer(read_tokenizer_files(folder))


def endless(model, tokenizer):
    """Make what answers two rows at once, each with as many tokens as it may have."""
    made = Answerer(model, tokenizer, 2)
    made.ends = set()
    return made


def questions(model, count, seed=0, longest=40):
    """Prompts of noise: some text, a clip, some text; budgets from 1 on."""
    rng = np.random.default_rng(seed)
    for key in range(count):
        clip = wave(int(rng.integers(3_200, 48_000)), seed=key)
        before, after = (rng.integers(0, 400, rng.integers(1, longest)) for _ in range(2))
        audio = np.full(audio_token_count(len(clip)), model.config.audio_token_id)
        ids = np.concatenate([before, audio, after]).astype(np.int32)
        yield Question(key, Sample(ids, np.full_like(ids, -100), clip), int(rng.integers(1, 30)))


def scored_slowly(model, question, choice):
    """Return the sum of the log-probabilities of a choice's tokens after the prompt, one after another."""
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
