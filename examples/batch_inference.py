"""Ask a model one question about each recording in a folder, and write the answers as a CSV.

    python examples/batch_inference.py recordings --prompt "What can be heard?" --output answers.csv

An interrupted run goes on behind its last answer when it is started again.
"""

import argparse
import csv
import sys
from pathlib import Path

import mdl_toolkit
from mdl_toolkit import InferenceOptions, ToolkitError, infer

PHRASES = Path(mdl_toolkit.__file__).parent / "phrases" / "audio"


def main() -> int:
    """Answer all recordings; a recording that cannot be used leaves its answer empty."""
    words = argparse.ArgumentParser(description="Ask one question about each recording in a folder.")
    words.add_argument("recordings", type=Path, nargs="?", default=PHRASES, help="folder, or pattern like 'a/*.wav'")
    words.add_argument("--model-name", default="mispeech/midashenglm-7b")
    words.add_argument("--prompt", default="Which language is spoken?")
    words.add_argument("--batch-size", type=int, default=32)
    words.add_argument("--max-new-tokens", type=int, default=64)
    words.add_argument("--output", type=Path, default=Path("answers.csv"))
    chosen = words.parse_args()
    options = InferenceOptions(
        input=str(chosen.recordings),
        output=str(chosen.output),
        model_name=chosen.model_name,
        user_prompt=chosen.prompt,
        batch_size=chosen.batch_size,
        max_new_tokens=chosen.max_new_tokens,
        on_error="keep",
    )
    try:
        infer(options)
    except ToolkitError as error:
        # With `keep` the CSV is written all the same if only some recordings cannot be used.
        print(error, file=sys.stderr)
        if not chosen.output.exists():
            return error.exit_status
    with chosen.output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    failed = sum(bool(row.get("error")) for row in rows)
    print(f"{chosen.output}: {len(rows) - failed} recordings answered, {failed} without an answer")
    return 0


# Recordings are read by several processes, which import this file: only the first one may ask.
if __name__ == "__main__":
    sys.exit(main())
