"""Settings of the runs on text, by preset and experiment; what is not named has its default.

A value beside those of the experiments is that of every experiment with such a flag. Experiments
that serve several problems call these presets language_smoke, language_small and so on.
"""

PRESETS = {
    # A minute: the synthetic language, everything small.
    "smoke": {
        "workdir": "runs/language-smoke",
        "train_language": {
            "data": "synthetic", "num_words": 16, "context": 32, "num_steps": 200,
            "batch_size": 32, "learning_rate": 3e-3, "num_heads": 4, "d_model": 32, "num_log": 5,
            "num_linear": 5, "block": 20,
        },
        "measure_language": {"num_sequences": 32, "num_probes": 32, "num_ngrams": 10},
    },
    # Real text without an accelerator: estimates at 32 checkpoints in one to two hours of two
    # cores, curvature in minutes a checkpoint of one, variations in hours.
    "small": {
        "workdir": "runs/language", "nbeta": 500.0,
        "train_language": {"learning_rate": 2e-3},
        "estimate_llc": {
            "num_data": 1024, "step_size": 7e-6, "localization": 10_000.0, "num_chains": 2,
            "num_draws": 100, "num_burnin": 70, "batch_size": 8,
        },
        "measure_curvature": {
            "num_data": 64, "num_iterations": 8, "num_probes": 3, "checkpoint_batch": 1,
        },
        "calibrate_sgld": {  # one temperature, two localizations
            "num_data": 1024, "localization": 5000.0, "step_fractions": "0.2,0.4",
            "nbeta_factors": "1", "localization_factors": "1,4", "num_checkpoints": 2,
            "batch_size": 8,
        },
        "vary_llc": {
            "num_data": 1024, "step_size": 7e-6, "localization": 10_000.0, "num_draws": 100,
            "num_burnin": 70, "batch_size": 8, "data_sizes": "128,512", "batch_sizes": "4,8,16",
            "fixed_sizes": "32", "seeds": "0,1",
        },
    },
    # All stages in minutes, in a language whose law is known.
    "synthetic": {
        "workdir": "runs/language-synthetic",
        "train_language": {
            "data": "synthetic", "num_heads": 4, "d_model": 64, "positions": "learned",
            "num_steps": 2000, "learning_rate": 3e-3, "num_warmup": 50,
        },
    },
    # The published model, optimizer and settings of the estimates, without burn-in (arXiv
    # 2402.02364, appendix A); wants an accelerator, and more text: see --data of train_language.
    "paper": {
        "workdir": "runs/language-paper",
        "train_language": {
            "context": 1024, "num_steps": 50_000, "batch_size": 100, "d_model": 256, "chunk": 128,
            "num_log": 100, "num_linear": 100, "block": 100,
        },
        "estimate_llc": {
            "num_data": 2**15, "step_size": 3e-3, "nbeta": 21.71, "localization": 300.0,
            "num_chains": 20, "num_draws": 200, "num_burnin": 0, "batch_size": 100,
            "grad_accum": 25, "chain_batch": 1,
        },
    },
}  # fmt: skip
