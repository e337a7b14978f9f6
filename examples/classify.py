"""Fine-tune on recordings with one label each, answer other recordings, and say how many answers are right.

    python examples/classify.py --output classify-output

trains on the phrases in five languages that come with the package. For data of your own, give a folder with
`train.csv` and `test.csv`: `--data FOLDER --prompt "Which instrument is played?"`.
"""

import argparse
from pathlib import Path

import mdl_toolkit
from mdl_toolkit import EvaluateOptions, InferenceOptions, TrainOptions, evaluate, infer, train

PHRASES = Path(mdl_toolkit.__file__).parent / "phrases"


def main() -> None:
    """Train, answer, evaluate."""
    words = argparse.ArgumentParser(description="Fine-tune a classifier of recordings.")
    words.add_argument("--model-name", default="mispeech/midashenglm-7b")
    words.add_argument("--data", type=Path, default=PHRASES, help="folder with train.csv and test.csv")
    words.add_argument("--prompt", default="Which language is spoken?")
    words.add_argument("--num-epochs", type=float, default=3)
    words.add_argument("--lr", type=float, default=1e-4)
    words.add_argument("--output", type=Path, default=Path("classify-output"))
    chosen = words.parse_args()
    answers = chosen.output / "answers.csv"

    result = train(
        TrainOptions(
            train_dataset=str(chosen.data / "train.csv"),
            output=str(chosen.output / "run"),
            model_name=chosen.model_name,
            base_dir=str(chosen.data),
            user_prompt=chosen.prompt,
            num_epochs=chosen.num_epochs,
            lr=chosen.lr,
            lora_rank=16,
        )
    )
    # The result knows the prompt it was trained with, so none is given here.
    infer(
        InferenceOptions(
            input=str(chosen.data / "test.csv"),
            output=str(answers),
            model_name=str(result.final),
            base_dir=str(chosen.data),
            max_new_tokens=16,
        )
    )
    evaluation = evaluate(
        EvaluateOptions(
            input=str(answers),
            reference=str(chosen.data / "test.csv"),
            metric=("accuracy", "macro-f1"),
            output=(str(chosen.output / "evaluation.json"),),
        )
    )
    for figure in evaluation.figures:
        print(f"{figure.metric}: {figure.value:.3f} (95 % interval {figure.low:.3f} to {figure.high:.3f})")


# A CSV is converted by several processes, which import this file: only the first one may train.
if __name__ == "__main__":
    main()
