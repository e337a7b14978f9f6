"""The report of `check`: its figures in words, line by line, in both languages."""

import unicodedata
from collections.abc import Iterator

from mdl_toolkit.data.check.findings import Figures
from mdl_toolkit.errors import RowProblem, RowsError
from mdl_toolkit.i18n import Localized, Verbatim, cut

# Lines, or pairs of prompts, that are named of a finding.
MOST_NAMED = 10
# Columns of the longest bar.
BAR = 40
# Marks around what is learnt: bold green in a terminal, brackets elsewhere.
BOLD_GREEN = ("\x1b[1;32m", "\x1b[0m")
BRACKETS = ("[[", "]]")

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
    "cancelled": Localized("silent because its channels cancel each other out (opposite phase); give one"),
    "no_length": Localized("does not say how long it is, so that a cut between two frames cannot be noticed"),
    "empty_answer": Localized("answer is empty"),
    "number_answer": Localized("answer is a number or a date that a spreadsheet would rewrite (0012, 1.0)"),
    "formula": Localized("answer or prompt that a spreadsheet would run as a formula (=1+1)"),
    "excel_answer": Localized(
        "answer is what Excel makes of another text (2-Jan, #NAME?, TRUE, 1.23E+11): see the original"
    ),
    "mark_prompt": Localized("prompt has a mark such as <audio>, which is read as plain text: remove it"),
    "copy": Localized("recording is an earlier row's at another level or rate"),
    "leak_copy": Localized("recording is also trained on, at another level or rate (= line there)"),
    "unseen_answer": Localized("answer that training never shows"),
    "near_answers": Localized("answers that differ in case, white space or full-width forms alone"),
    "space_answer": Localized("white space around the answer"),
    "space_prompt": Localized("white space around a prompt"),
    "too_long": Localized("longer than --max-length (its length)"),
    "long": Localized("longer than 30 s, the longest that the model's authors give figures for (its length)"),
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
    "leak_overlap": Localized("some of its sound is also trained on (= line there)"),
    "same_recording": Localized("another part of its recording is also trained on (= line there)"),
    "same_text": Localized("answer is also trained on, with another recording"),
    "near_prompts": Localized("prompts that differ in one letter"),
}
# The detail of a row behind its line; by default, another line.
DETAILS = {"clipped": " ({:.1%})", "too_long": " ({})", "long": " ({:g} s)"}
OTHER_LINE = " (= {})"


def report_lines(figures: Figures, *, coloured: bool) -> Iterator[Localized]:
    """Yield the lines of the report; what is learnt is coloured, or in brackets."""
    for file in figures["files"]:
        yield Localized(
            "{path} ({role}): {rows:,} {rows:row|rows}, {hours:,.3f} hours",
            path=file["path"],
            role=ROLES[file["role"]],
            rows=file["rows"],
            hours=file["seconds"] / 3600,
        )
        if file["rows"]:
            yield from _amount_lines(file, figures["counted"])
        for finding in file["findings"]:
            yield from _finding_lines(finding)
        if file["bad"]["rows"]:
            problems = [*map(RowProblem.from_json, file["bad"]["first"])]
            yield RowsError(file["path"], problems, file["bad"]["problems"]).message
    if figures["sample"]:
        yield from _sample_lines(figures["sample"], BOLD_GREEN if coloured else BRACKETS)
    if figures["training"]:
        yield from _training_lines(figures["training"])
    if fixed := figures["fixed"]:
        if fixed["rows"]:
            yield Localized("{path}: {rows:,} {rows:row|rows} written, {left_out:,} left out", **fixed)
            if fixed.get("cut"):
                yield Localized(
                    "  {cut:,} {cut:row|rows} cut into parts: see that each has what its label says", **fixed
                )
        else:
            yield Localized("{path}: not written, as no row can be used", path=fixed["path"])


def _amount_lines(file: Figures, counted: str) -> Iterator[Localized]:
    """Describe recordings, lengths, tokens, size on disk and answers of a file."""
    sources = {
        name: ", ".join(f"{value} x {rows:,}" for value, rows in file[name].items())
        for name in ("rates", "channels", "formats")
    }
    yield Localized("  recordings: {rates} Hz; channels: {channels}; formats: {formats}", **sources)
    lengths = file["lengths"]
    shortest, longest = (f"{lengths[name]:.2f}" for name in ("shortest", "longest"))
    yield Localized("  length: {shortest} s to {longest} s", shortest=shortest, longest=longest)
    # A bar for each range of seconds that has rows.
    most = max(lengths["rows"])
    below: float = 0
    for edge, rows in zip(lengths["below_seconds"], lengths["rows"], strict=True):
        label = f"{below:g} s -" if edge is None else f"{below:g} - {edge:g} s"
        if rows:
            bar = f"    {label:>12} {rows:>9,}  {'#' * max(1, round(BAR * rows / most))}"
            yield Verbatim(bar, bar)
        below = edge or below
    unit = Localized("tokens") if counted == "tokens" else Localized("characters")
    yield Localized("  audio tokens of a row: {audio}", audio=_spread(file["audio_tokens"]))
    yield Localized("  text {unit} of a row: {text}", unit=unit, text=_spread(file["text"]))
    yield Localized("  on disk after conversion: {size}", size=f"{file['disk_bytes'] / 1e6:,.1f} MB")
    if answers := file.get("answers"):
        count = answers["distinct"]
        classes = ", ".join(f"{_shown(text)} x {rows:,}" for text, rows in answers["classes"])
        if classes:
            yield Localized("  different answers: {count:,} ({classes})", count=count, classes=classes)
        else:
            yield Localized("  different answers: {count:,}", count=count)


def _spread(values: Figures) -> Localized:
    """Describe the spread of a figure over the rows."""
    median, p95, most = (f"{values[name]:,}" for name in ("median", "p95", "max"))
    return Localized("median {median}, 95 % up to {p95}, longest {most}", median=median, p95=p95, most=most)


def _finding_lines(figures: Figures) -> Iterator[Localized]:
    """Describe a finding with its first lines, each with its detail, or with its pairs of prompts."""
    finding, rows = FINDINGS[figures["name"]], figures["rows"]
    lines = figures.get("lines", [])[:MOST_NAMED]
    detail_format = DETAILS.get(figures["name"], OTHER_LINE)
    details = [detail_format.format(value) for value in figures.get("details", [])] or [""] * len(lines)
    shown = [f"{line}{detail}" for line, detail in zip(lines, details, strict=False)]
    if rows > len(lines) > 0:
        shown.append("...")
    if shown:
        yield Localized(
            "  warning: {finding}: {rows:,}, line {lines}", finding=finding, rows=rows, lines=", ".join(shown)
        )
    else:
        yield Localized("  warning: {finding}: {rows:,}", finding=finding, rows=rows)
    if ends := figures.get("answers"):
        one, other = (Localized("{text} x {rows:,}", text=_shown(text), rows=count) for text, count in ends)
        yield Localized("    {one}, {other}", one=one, other=other)
    for pair in figures.get("pairs", ())[:MOST_NAMED]:
        one, other = (
            Localized("{text} ({rows:,} from line {line})", text=_shown(text), rows=rows, line=line)
            for text, rows, line in zip(
                pair.get("prompts") or pair["answers"], pair["rows"], pair["lines"], strict=True
            )
        )
        yield Localized("    {one}, {other}", one=one, other=other)


def _shown(text: str, most: int = 60) -> str:
    """Quote a text from a CSV, shortened, and harmless in a terminal."""
    return repr(text if len(text) <= most else text[: most - 1] + "…")


def _sample_lines(sample: Figures, marks: tuple[str, str]) -> Iterator[Localized]:
    """Show a row as the model sees it, with marks around what is learnt."""
    begin, end = marks
    yield Localized(
        "line {line} as the model sees it ({begin}learnt{end}):", line=sample["line"], begin=begin, end=end
    )
    text, is_open = "", False
    for segment in sample["segments"]:
        is_answer = segment["kind"] == "answer"
        text += (begin if is_answer and not is_open else "") + (end if is_open and not is_answer else "")
        # Control characters could do something to a terminal.
        text += "".join(
            letter if letter in "\n\t" or unicodedata.category(letter)[0] != "C" else repr(letter)[1:-1]
            for letter in cut(segment["text"])
        )
        is_open = is_answer
    shown = "\n".join(f"  {line}" for line in (text + end * is_open).splitlines())
    yield Verbatim(shown, shown)


def _training_lines(training: Figures) -> Iterator[Localized]:
    """Describe memory, steps and time of a training, or the problem that stops it."""
    if problem := training.get("problem"):
        yield Verbatim(**problem)
        return
    yield Localized("a training on a GPU in {dtype}:", dtype=training["dtype"])
    for line in training["memory"]:
        yield Localized("  {line}", line=Verbatim(**line))
    if warning := training["warning"]:
        yield Localized("  warning: {warning}", warning=Verbatim(**warning))
    epochs = f"{training['epochs']:g}"
    steps, steps_per_epoch, batch = (
        f"{training[name]:,}" for name in ("steps", "steps_per_epoch", "effective_batch")
    )
    yield Localized(
        "  steps: {steps} in {epochs} {epochs:epoch|epochs} of {each}, effective batch {batch} on one GPU",
        steps=steps,
        epochs=epochs,
        each=steps_per_epoch,
        batch=batch,
    )
    if expectation := training["expectation"]:
        yield Localized("  warning: {warning}", warning=Verbatim(**expectation))
    operations = training["operations"]
    amount, hours = f"{operations / 1e12:,.4g}", f"{operations / (100e12 * 3600):.3g}"
    yield Localized(
        "  time: {amount} TFLOP in matrix products, {hours} hours for a GPU that sustains 100 TFLOP/s; "
        "how fast yours is, `train` says after three steps",
        amount=amount,
        hours=hours,
    )
    yield Localized("a training that fits rows, memory and device:")
    yield Verbatim(f"  {training['command']}", f"  {training['command']}")
