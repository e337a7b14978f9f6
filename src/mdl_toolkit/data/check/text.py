"""The figures of `check` in words, line by line, in both languages."""

import unicodedata
from collections.abc import Iterator

from mdl_toolkit.data.check.findings import Figures
from mdl_toolkit.errors import RowProblem, RowsError
from mdl_toolkit.i18n import Localized, Verbatim

MOST_NAMED = 10  # lines, or pairs of prompts, of a finding
BAR = 40  # columns of the longest bar
LEARNT = ("\x1b[1;32m", "\x1b[0m")  # around what is learnt: bold green in a terminal ...
BRACKETS = ("[[", "]]")  # ... and brackets elsewhere

ROLES = {
    "training": Localized("training"),
    "evaluation": Localized("evaluation"),
    "inference": Localized("inference"),
}
FINDINGS = {
    "silent": Localized("silent"),
    "nearly_empty": Localized("nearly empty, less than 5 % of it above -50 dBFS"),
    "clipped": Localized("clipped, recorded too loud (share of samples at full scale)"),
    "padded": Localized("shorter than 0.2 s, padded to one audio token"),
    "truncated": Localized("cut off, accepted by --allow-truncated"),
    "empty_answer": Localized("answer is empty"),
    "number_answer": Localized("answer is a number or a date that a spreadsheet would rewrite (0012, 1.0)"),
    "space_answer": Localized("white space around the answer"),
    "space_prompt": Localized("white space around a prompt"),
    "too_long": Localized("longer than --max-length (its length)"),
    "duplicate": Localized("recording, prompt and answer of an earlier row again"),
    "other_prompt": Localized("recording of an earlier row under another prompt"),
    "contradiction": Localized(
        "recording and prompt of an earlier row with another answer: is one mislabelled?"
    ),
    "identical_answers": Localized("all rows have one answer, so there is nothing else to learn"),
    "unbalanced": Localized("one answer has ten times the rows of another (rows of the most frequent)"),
    "leak": Localized("recording, prompt and answer are also trained on (= line there)"),
    "leak_other_text": Localized(
        "recording is also trained on, with another prompt or answer (= line there)"
    ),
    "same_text": Localized("answer is also trained on, with another recording"),
    "near_prompts": Localized("prompts that differ in one letter"),
}
DETAILS = {"clipped": " ({:.1%})", "too_long": " ({})"}  # of a row, behind its line
OTHER_LINE = " (= {})"  # for all others


def report_lines(figures: Figures, *, coloured: bool) -> Iterator[Localized]:
    """Yield the lines of the report; what is learnt is coloured, or in brackets."""
    for file in figures["files"]:
        yield from _file_lines(file, figures["counted"])
    if figures["sample"]:
        yield from _sample_lines(figures["sample"], LEARNT if coloured else BRACKETS)
    if figures["training"]:
        yield from _training_lines(figures["training"])
    if fixed := figures["fixed"]:
        yield _fixed_line(**fixed)


def _fixed_line(path: str, rows: int, left_out: int) -> Localized:
    if not rows:
        return Localized("{path}: not written, as no row can be used", path=path)
    return Localized(
        "{path}: {rows:,} rows written, {left_out:,} left out", path=path, rows=rows, left_out=left_out
    )


# --- one file ------------------------------------------------------------------------------------------


def _file_lines(file: Figures, counted: str) -> Iterator[Localized]:
    role, hours = ROLES[file["role"]], file["seconds"] / 3600
    yield Localized(
        "{path} ({role}): {rows:,} rows, {hours:,.3f} hours",
        path=file["path"],
        role=role,
        rows=file["rows"],
        hours=hours,
    )
    if file["rows"]:
        yield from _amount_lines(file, counted)
    for each in file["findings"]:
        yield from _finding_lines(each)
    bad = file["bad"]
    if bad["rows"]:
        yield _bad_rows(file["path"], bad)


def _amount_lines(file: Figures, counted: str) -> Iterator[Localized]:
    rates, channels, formats = (_counts(file[name]) for name in ("rates", "channels", "formats"))
    yield Localized(
        "  recordings: {rates} Hz; channels: {channels}; formats: {formats}",
        rates=rates,
        channels=channels,
        formats=formats,
    )
    yield from _histogram_lines(file["lengths"])
    audio, text = _spread(file["audio_tokens"]), _spread(file["text"])
    unit = Localized("tokens") if counted == "tokens" else Localized("characters")
    yield Localized("  audio tokens of a row: {audio}", audio=audio)
    yield Localized("  text {unit} of a row: {text}", unit=unit, text=text)
    size = f"{file['disk_bytes'] / 1e6:,.1f} MB"
    yield Localized("  on disk after conversion: {size}", size=size)
    if answers := file.get("answers"):
        yield from _answer_lines(answers)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{value} x {rows:,}" for value, rows in counts.items())


def _spread(values: Figures) -> Localized:
    median, p95, most = (f"{values[name]:,}" for name in ("median", "p95", "max"))
    return Localized("median {median}, 95 % up to {p95}, longest {most}", median=median, p95=p95, most=most)


def _histogram_lines(lengths: Figures) -> Iterator[Localized]:
    """Draw a bar for each range that has rows, in seconds."""
    shortest, longest = (f"{lengths[name]:.2f}" for name in ("shortest", "longest"))
    yield Localized("  length: {shortest} s to {longest} s", shortest=shortest, longest=longest)
    most = max(lengths["rows"])
    below: float = 0
    for edge, rows in zip(lengths["below_seconds"], lengths["rows"], strict=True):
        label = f"{below:g} s -" if edge is None else f"{below:g} - {edge:g} s"
        if rows:
            bar = f"    {label:>12} {rows:>9,}  {'#' * max(1, round(BAR * rows / most))}"
            yield Verbatim(bar, bar)
        below = edge or below


def _answer_lines(answers: Figures) -> Iterator[Localized]:
    classes = ", ".join(f"{_shown(text)} x {rows:,}" for text, rows in answers["classes"])
    if classes:
        yield Localized(
            "  different answers: {count:,} ({classes})", count=answers["distinct"], classes=classes
        )
    else:
        yield Localized("  different answers: {count:,}", count=answers["distinct"])


def _finding_lines(found: Figures) -> Iterator[Localized]:
    finding, rows, lines = FINDINGS[found["name"]], found["rows"], _named(found)
    if lines:
        yield Localized(
            "  warning: {finding}: {rows:,}, line {lines}", finding=finding, rows=rows, lines=lines
        )
    else:
        yield Localized("  warning: {finding}: {rows:,}", finding=finding, rows=rows)
    for pair in found.get("pairs", ())[:MOST_NAMED]:
        one, other = (
            Localized("{text} ({rows:,} from line {line})", text=_shown(text), rows=rows, line=line)
            for text, rows, line in zip(pair["prompts"], pair["rows"], pair["lines"], strict=True)
        )
        yield Localized("    {one}, {other}", one=one, other=other)


def _named(found: Figures) -> str:
    """List the first lines of a finding, each with its figure."""
    lines, form = found.get("lines", [])[:MOST_NAMED], DETAILS.get(found["name"], OTHER_LINE)
    details = [form.format(value) for value in found.get("details", [])] or [""] * len(lines)
    shown = ", ".join(f"{line}{detail}" for line, detail in zip(lines, details, strict=False))
    return f"{shown}, ..." if found["rows"] > len(lines) > 0 else shown


def _bad_rows(path: str, bad: Figures) -> Localized:
    problems = [*map(RowProblem.from_json, bad["first"])]
    return RowsError(path, problems, bad["problems"]).message


def _shown(text: str, most: int = 60) -> str:
    """Quote a text from a CSV, shortened, and harmless in a terminal."""
    return repr(text if len(text) <= most else text[: most - 1] + "…")


# --- a row, and what a training takes ------------------------------------------------------------------


def _sample_lines(sample: Figures, marks: tuple[str, str]) -> Iterator[Localized]:
    begin, end = marks
    yield Localized(
        "line {line} as the model sees it ({begin}learnt{end}):", line=sample["line"], begin=begin, end=end
    )
    pieces, is_open = "", False
    for segment in sample["segments"]:
        is_answer = segment["kind"] == "answer"
        pieces += (begin if is_answer and not is_open else "") + (end if is_open and not is_answer else "")
        pieces += _harmless(segment["text"])
        is_open = is_answer
    shown = "\n".join(f"  {line}" for line in (pieces + end * is_open).splitlines())
    yield Verbatim(shown, shown)


def _harmless(text: str) -> str:
    """Escape the control characters by which a text could do something to a terminal."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter)[0] != "C" else repr(letter)[1:-1]
        for letter in text
    )


def _training_lines(training: Figures) -> Iterator[Localized]:
    if problem := training.get("problem"):
        yield Verbatim(**problem)
        return
    yield Localized("a training on a GPU in {dtype}:", dtype=training["dtype"])
    for line in training["memory"]:
        yield Localized("  {line}", line=Verbatim(**line))
    if warning := training["warning"]:
        yield Localized("  warning: {warning}", warning=Verbatim(**warning))
    epochs = f"{training['epochs']:g}"
    steps, each, batch = (f"{training[name]:,}" for name in ("steps", "steps_per_epoch", "effective_batch"))
    yield Localized(
        "  steps: {steps} in {epochs} epochs of {each}, effective batch {batch} on one GPU",
        steps=steps,
        epochs=epochs,
        each=each,
        batch=batch,
    )
    done = training["operations"]
    amount, hours = f"{done / 1e12:,.4g}", f"{done / (100e12 * 3600):.3g}"
    yield Localized(
        "  time: {amount} TFLOP in matrix products, {hours} hours for a GPU that sustains 100 TFLOP/s; "
        "how fast yours is, `train` says after three steps",
        amount=amount,
        hours=hours,
    )
