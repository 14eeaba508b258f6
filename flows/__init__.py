"""When the pipeline runs, and what Prefect shows of it. Must not know: how anything is done.

`segment_corpus`, `train_model`, `evaluate_model` and `refresh_model` the flows; `parameters` their forms, made from the
configuration that the command line uses; `driving` one pipeline call inside a task: cancelled, followed, logged;
`retries` what is tried again; `artifacts` and `model_artifacts` what the UI shows; `promotions` the event of each;
`automations` what the server does by itself. The table and the registry are the memory: no flow keeps state of its own,
but for how far promotions were told.
"""
