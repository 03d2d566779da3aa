"""Short probes and fine-tunings."""

from __future__ import annotations

import taskvec as tv
from taskvec.core.settings import Finetune, Probe
from taskvec.data.tasks import Task
from taskvec.encoders.backbone import Backbone
from taskvec.learning.heads import Head
from taskvec.weights.flat import Weights

QUICK = Probe(steps=60, batch_size=16, warmup=5, learning_rates=(0.003, 0.03))


TUNE = Finetune(steps=12, batch_size=16, warmup=2, learning_rate=0.01)


def tune(backbone: Backbone, tasks: list[Task]) -> tuple[list[Head], list[Weights], list[Weights]]:
    probed = [tv.fit_head(backbone, task, QUICK) for task in tasks]
    tuned = [tv.finetune(backbone, task, head, TUNE) for task, head in zip(tasks, probed, strict=True)]
    return probed, tuned, [tv.task_vector(backbone, weights) for weights in tuned]
