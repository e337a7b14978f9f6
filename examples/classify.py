"""Fine-tune on recordings with one label each, answer other recordings, and say how many are right.

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
    parser = argparse.ArgumentParser(description="Fine-tune a classifier of recordings.")
    parser.add_argument("--model-name", default="mispeech/midashenglm-7b")
    parser.add_argument("--data", type=Path, default=PHRASES, help="folder with train.csv and test.csv")
    parser.add_argument("--prompt", default="Which language is spoken?")
    parser.add_argument("--num-epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, default=Path("classify-output"))
    args = parser.parse_args()
    answers = args.output / "answers.csv"

    result = train(
        TrainOptions(
            train_dataset=str(args.data / "train.csv"),
            output=str(args.output / "run"),
            model_name=args.model_name,
            base_dir=str(args.data),
            user_prompt=args.prompt,
            num_epochs=args.num_epochs,
            lr=args.lr,
            lora_rank=16,
        )
    )
    # The result knows the prompt it was trained with, so none is given here.
    infer(
        InferenceOptions(
            input=str(args.data / "test.csv"),
            output=str(answers),
            model_name=str(result.final),
            base_dir=str(args.data),
            max_new_tokens=16,
        )
    )
    evaluation = evaluate(
        EvaluateOptions(
            input=str(answers),
            reference=str(args.data / "test.csv"),
            metric=("accuracy", "macro-f1"),
            output=(str(args.output / "evaluation.json"),),
        )
    )
    for figure in evaluation.metrics:
        print(f"{figure.metric}: {figure.value:.3f}")


# A CSV is converted by several processes, which import this file: only the first one may train.
if __name__ == "__main__":
    main()
