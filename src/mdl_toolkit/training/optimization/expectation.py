"""Tell in words what a run can teach by its rows, steps and learning rate, as measured on small models.

AdamW moves a weight by about the learning rate in each step, whatever the loss, so that the sum of the
learning rates over all steps says how far weights can get. The sums below come from a table in
`docs/training`.
"""

import math
from dataclasses import replace

from mdl_toolkit.config.options import spelling
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import word_of
from mdl_toolkit.i18n import Localized, join_messages
from mdl_toolkit.training.optimization.optimizer import learning_rates
from mdl_toolkit.training.optimization.schedule import Schedule

# With a smaller sum nothing was learnt; with the larger one most of a task.
NOTHING, MOST = 0.005, 0.025
# What is suggested at most.
MOST_EPOCHS, HIGHEST = 10, 5e-4
# So many different answers are not told from more.
MANY_ANSWERS = 1000
# Steps whose learning rates are looked at.
LOOKED_AT = 1000


def rate_sum(options: TrainOptions, schedule: Schedule) -> float:
    """Return the sum of the highest learning rate over all steps of a run."""
    steps = range(0, schedule.total, math.ceil(schedule.total / LOOKED_AT))
    share = sum(map(schedule.rate, steps)) / len(steps)
    return max(learning_rates(options).values()) * schedule.total * share


def longer_run(options: TrainOptions, per_epoch: int) -> TrainOptions:
    """Return options with as many steps, and then as high a learning rate, as teach most of a task.

    Args:
        options: of the run; where these do, or one rate does not stand for all, they stay.
        per_epoch: steps in an epoch.
    """
    schedule = Schedule.of(per_epoch, options)
    lacking = MOST / max(rate_sum(options, schedule), 1e-30)
    steps = math.ceil(min(lacking * schedule.total, MOST_EPOCHS * per_epoch))
    if steps > schedule.total:
        lacking *= schedule.total / steps
        epochs = float(math.ceil(steps / per_epoch))
        is_counted = options.max_steps is not None
        options = replace(options, **{"max_steps": steps} if is_counted else {"num_epochs": epochs})
    if lacking > 1 and isinstance(options.lr, float) and options.lr < HIGHEST:
        options = replace(options, lr=min(HIGHEST, float(f"{options.lr * lacking:.0e}")))
    return options


def is_too_short(options: TrainOptions, schedule: Schedule) -> bool:
    """Tell whether a run makes fewer or smaller steps than any that taught something."""
    return rate_sum(options, schedule) < NOTHING


def what_to_expect(options: TrainOptions, schedule: Schedule, rows: int, answers: int) -> Localized:
    """Say that a run is too short to learn a new task, and what would do.

    Args:
        options: of the run.
        schedule: its steps.
        rows: to learn from.
        answers: different ones among them; from `MANY_ANSWERS` on there may be more.
    """
    other = longer_run(options, schedule.per_epoch)
    higher = Localized("a higher --lr")
    different = Localized("{count:,} different {count:answer|answers}", count=answers)
    if answers >= MANY_ANSWERS:
        different = Localized("at least {count:,} different answers", count=answers)
    remedies = [
        Localized("{option}", option=f"{spelling(name)} {word_of(getattr(other, name))}")
        for name in ("num_epochs", "max_steps", "lr")
        if getattr(options, name) != getattr(other, name)
    ]
    return Localized(
        "{steps:,} {steps:step|steps} at a learning rate of {rate:g}, {rows:,} {rows:row|rows}, "
        "{different}: too little to learn a new task (small models learnt nothing "
        "from so much); try {remedy}",
        steps=schedule.total,
        rate=max(learning_rates(options).values()),
        rows=rows,
        different=different,
        remedy=join_messages(remedies or [higher], "{left} {right}"),
    )
