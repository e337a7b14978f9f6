"""Fine-tune on recordings with free text as answers, and set the model's answers beside the references.

    python examples/caption.py --output caption-output

learns to write down what is said in the phrases that come with the package. Captions, summaries or
translations are trained in the same way: `--data FOLDER --text-column caption --prompt "What can be heard?"`.
"""

import argparse
import csv
from pathlib import Path

import mdl_toolkit
from mdl_toolkit import EvaluateOptions, InferenceOptions, TrainOptions, evaluate, infer, train

PHRASES = Path(mdl_toolkit.__file__).parent / "phrases"


def main() -> None:
    """Train, answer, evaluate, and print some of the answers."""
    parser = argparse.ArgumentParser(description="Fine-tune a model that answers in free text.")
    parser.add_argument("--model-name", default="mispeech/midashenglm-7b")
    parser.add_argument("--data", type=Path, default=PHRASES, help="folder with train.csv and test.csv")
    parser.add_argument("--text-column", default="transcript", help="the column with the text to learn")
    parser.add_argument("--prompt", default="Write down what is said.")
    parser.add_argument("--num-epochs", type=float, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("caption-output"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train_csv, test_csv = (
        with_text(args.data / name, args.output / name, args.text_column)
        for name in ("train.csv", "test.csv")
    )
    answers = args.output / "answers.csv"

    result = train(
        TrainOptions(
            train_dataset=str(train_csv),
            output=str(args.output / "run"),
            model_name=args.model_name,
            base_dir=str(args.data),
            user_prompt=args.prompt,
            num_epochs=args.num_epochs,
            lora_rank=32,
        )
    )
    infer(
        InferenceOptions(
            input=str(test_csv),
            output=str(answers),
            model_name=str(result.final),
            base_dir=str(args.data),
            max_new_tokens=args.max_new_tokens,
        )
    )
    evaluation = evaluate(
        EvaluateOptions(input=str(answers), reference=str(test_csv), metric=("wer", "cer", "chrf"))
    )
    for figure in evaluation.metrics:
        print(f"{figure.metric}: {figure.value:.3f}")
    for answer, reference in list(zip(texts(answers), texts(test_csv), strict=True))[:5]:
        print(f"\nreference: {reference}\nanswer:    {answer}")


def with_text(source: Path, target: Path, column: str) -> Path:
    """Write a CSV of the same recordings with another column's text as the answer to learn."""
    with source.open(encoding="utf-8", newline="") as file:
        rows = [{"audio": row["audio"], "prediction": row[column]} for row in csv.DictReader(file)]
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["audio", "prediction"])
        writer.writeheader()
        writer.writerows(rows)
    return target


def texts(path: Path) -> list[str]:
    """Read the answers of a CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row["prediction"] for row in csv.DictReader(file)]


# A CSV is converted by several processes, which import this file: only the first one may train.
if __name__ == "__main__":
    main()
