"""`python -m tjx_eval`: the evaluation program."""

import sys

from tjx_eval.main import main

sys.exit(main())
