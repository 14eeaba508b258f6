"""Read by Python at its start, in the worker processes of `maskmill_run.py`: they load the stand-in."""

import os
import sys

if "pipeline.engine.crew" in sys.orig_argv:
    from stand_in import StandIn

    from pipeline.engine import worker

    worker.load_segmenter = lambda spec, model: StandIn(float(os.environ["MASKMILL_STAND_IN_SLEEPS_S"]))
