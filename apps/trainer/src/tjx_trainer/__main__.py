"""`python -m tjx_trainer`: the trainer's program."""

from tjx_trainer.main import run

run()
