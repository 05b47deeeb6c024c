"""`threadweaver reproduce`: the paper's experiment from data to report, sequential and fork/join side by side.

    data ─► start ─┬─► sequential: sft ─► mixed ─► self-training ─► GRPO   ─┐
                   └─► fork/join:  sft ─► mixed ─► self-training ─► P-GRPO ─┴─► evaluation of every stage ─► report

    settings   what a run depends on, presets, one flag an ablation
    stages     a stage: a folder, its stage.json, and going on after a kill
    rows       data set rows of a stage, the published ("leaky") loss for comparison
    measure    decoding and grading of held-out problems, wall clock by batch size
    reinforcement  the trainer of P-GRPO and GRPO, and who decodes for it
    sides      the stages of one side; a process of its own where both run at once
    report     report.md, report.html, examples.html and the plots
    command    `reproduce` and its flags

Tests: tests/recipes/pipelines/test_reproduce*.py.
"""
