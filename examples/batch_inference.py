"""Ask a model one question about each recording in a folder, and write the answers as a CSV.

    python examples/batch_inference.py recordings --prompt "What can be heard?" --output answers.csv

An interrupted run goes on behind its last answer when it is started again.
"""

import argparse
import sys
from pathlib import Path

import mdl_toolkit
from mdl_toolkit import InferenceOptions, ToolkitError, infer

PHRASES = Path(mdl_toolkit.__file__).parent / "phrases" / "audio"


def main() -> None:
    """Answer all recordings; one that cannot be used gets no answer, but a reason in the column `error`."""
    parser = argparse.ArgumentParser(description="Ask one question about each recording in a folder.")
    parser.add_argument(
        "recordings", type=Path, nargs="?", default=PHRASES, help="folder, or pattern like 'a/*.wav'"
    )
    parser.add_argument("--model-name", default="mispeech/midashenglm-7b")
    parser.add_argument("--prompt", default="Which language is spoken?")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("answers.csv"))
    args = parser.parse_args()
    options = InferenceOptions(
        input=str(args.recordings),
        output=str(args.output),
        model_name=args.model_name,
        user_prompt=args.prompt,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        on_error="keep",
    )
    try:
        answers = infer(options)
    except ToolkitError as error:
        # With `keep`, the CSV is there all the same if only some recordings cannot be used.
        sys.exit(str(error))
    print(f"{args.output}: {len(answers)} recordings answered")


# Recordings are read by several processes, which import this file: only the first one may ask.
if __name__ == "__main__":
    main()
