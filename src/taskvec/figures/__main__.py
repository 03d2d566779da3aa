"""Draw a share of a run's figures, as the process that started this one asks on standard input."""

import pickle
import sys

from taskvec.figures import draw_share

draw_share(*pickle.load(sys.stdin.buffer))
