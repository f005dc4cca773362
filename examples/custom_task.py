"""Train your own model on your own task with the trainer: see examples/example_extension.

Run: `python examples/custom_task.py` with tjx-trainer installed, or
`./pants run examples/custom_task.py`. The package `example_extension` beside this script adds a
model family, a task, an attention backend, an optimizer, a schedule, a metric and a tracker
(docs/extending.md explains its code); a name with a dot imports the module that registers it. It
prints the trainer's report with the loss of the task, which is near 0 once the model counts. Flags
are added: `python examples/custom_task.py --train.max_steps 50 --run_dir runs/counting`.
"""

import sys

from tjx_trainer.main import main

FLAGS = {
    "model.family": "example_extension.model",
    "model.residual_scale": 0.5,  # a field of this family
    "model.attention_implementation": "example_extension.attention",
    "optimizer.name": "example_extension.optimizer",
    "task": "example_extension.task",
    "schedule.name": "example_extension.schedule",
    "log.trackers": "example_extension.tracker",
    "log.metrics": "example_extension.metric",
    "model.n_head": 2,
    "model.d_model": 16,
    "model.max_seq_len": 8,
    "data.seq_len": 8,
    "train.max_steps": 20,
    "train.batch_size": 8,
    "train.eval_every": 20,
    "optimizer.learning_rate": 0.05,
    "schedule.warmup_steps": 2,
    "log.every": 10,
}

if __name__ == "__main__":
    sys.exit(main([f"--{name}={value}" for name, value in FLAGS.items()] + sys.argv[1:]))
