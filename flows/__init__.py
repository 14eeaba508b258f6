"""The flows that call the pipeline on a schedule. Empty so far: nothing here is scheduled yet."""
