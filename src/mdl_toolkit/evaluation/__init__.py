"""Predictions against references.

Modules:
    evaluate       `evaluate`: metrics, intervals, groups, comparison of two systems
    metrics        corpus metrics: accuracy, macro F1, WER, CER, BLEU, chrF, mAP
    text_metrics   how good one answer is, as sums that can be added up
    bootstrap      confidence intervals and paired tests
    align          predictions beside their references
    csv_table      a whole CSV in memory, and which row belongs to which
    results        values of an evaluation, and their JSON and CSV
    render         text tables of an evaluation for the terminal
"""
