"""Draw a share of a run's figures, as the process that started this one asks on standard input."""

import json
import os
import pickle
import sys

from taskvec.report.figures.drawing import draw_share

answer = os.dup(1)
os.dup2(2, 1)  # what a library prints is no answer
noted = draw_share(*pickle.load(sys.stdin.buffer))
with os.fdopen(answer, "w") as pipe:
    json.dump(noted, pipe)
