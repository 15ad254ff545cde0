"""Settings of the runs in regression, by preset and experiment; what is not named has its default.

A value beside those of the experiments is that of every experiment with such a flag.
"""

PRESETS = {
    # Seconds: everything small.
    "smoke": {
        "workdir": "runs/smoke",
        "train_regression": {
            "num_steps": 60, "batch_size": 32, "d_model": 16, "d_mlp": 16, "num_layers": 1,
            "num_heads": 2, "num_log": 4, "num_linear": 3, "block": 20,
        },
        "estimate_llc": {
            "num_data": 256, "num_draws": 20, "num_burnin": 10, "localization": 1000.0,
        },
        "measure_curvature": {"num_data": 64, "num_probes": 2, "num_iterations": 6},
        "measure_behavior": {"num_sequences": 64, "num_far": 32, "num_attention": 32},
        "measure_trajectory": {"num_sequences": 16},
        "calibrate_sgld": {
            "num_data": 256, "num_draws": 20, "num_burnin": 20, "num_checkpoints": 1,
        },
        "vary_llc": {
            "num_checkpoints": 2, "num_data": 128, "num_draws": 12, "num_burnin": 12,
            "data_sizes": "64,128", "batch_sizes": "16,32", "fixed_sizes": "64", "seeds": "0,1",
            "step_factors": "1", "nbeta_factors": "1,3", "localization_factors": "1",
        },
    },
    # Minutes: the defaults of every flag. The paper's model and a short one-cycle at its peak rate;
    # strong localization, so that the chains forget their start within burn-in.
    "quickstart": {"workdir": "runs/quickstart"},
    # Under an hour on two cores, two seeds at once: closer to the checkpoints and longer.
    "small": {
        "workdir": "runs/small", "nbeta": 100.0,
        "train_regression": {
            "num_steps": 16_000, "batch_size": 128, "num_log": 24, "num_linear": 16, "block": 1000,
        },
        "estimate_llc": {
            "num_data": 8192, "step_size": 5e-5, "localization": 1000.0, "num_draws": 300,
            "num_burnin": 150,
        },
        "measure_behavior": {"num_sequences": 8192, "num_far": 1024, "num_attention": 1024},
        "measure_trajectory": {"num_sequences": 1024, "block": 256},
        "calibrate_sgld": {
            "num_data": 8192, "num_chains": 4, "num_draws": 300, "num_burnin": 300,
        },
        "vary_llc": {
            "num_checkpoints": 6, "num_data": 8192, "step_size": 5e-5, "localization": 1000.0,
            "num_draws": 200, "num_burnin": 120, "data_sizes": "512,2048,8192",
            "batch_sizes": "16,32,64,128", "fixed_sizes": "256,1024",
        },
    },
    # The published run, seed 1, with 191 checkpoints, and the published settings of its estimates:
    # Hoogland et al. 2024 (arXiv 2402.02364), table A.9. Wants an accelerator.
    "paper": {
        "workdir": "runs/paper", "step_size": 3e-4, "nbeta": 66.67,
        "train_regression": {
            "num_steps": 500_000, "batch_size": 256, "double_residual": True, "num_log": 100,
            "num_linear": 100, "block": 1000,
        },
        "estimate_llc": {
            "num_data": 2**20, "localization": 6.67, "num_chains": 10, "num_draws": 4000,
            "num_burnin": 1000, "batch_size": 1024, "checkpoint_batch": 8,
        },
        "measure_curvature": {
            "num_data": 2**15, "num_deflated": 48, "num_probes": 16, "num_iterations": 48,
            "micro_batch": 4096, "checkpoint_batch": 8,
        },
        "measure_behavior": {"num_sequences": 8192, "num_far": 1024, "num_attention": 1024},
        # 81,920 predictions; --all_outputs --num_sequences=1024 as published.
        "measure_trajectory": {"num_sequences": 10_240, "block": 512},
        "calibrate_sgld": {
            "num_data": 2**20, "num_chains": 4, "num_draws": 1000, "num_burnin": 1000,
            "batch_size": 1024, "setting_batch": 9, "num_checkpoints": 8,
        },
        "vary_llc": {
            "num_data": 2**20, "localization": 6.67, "num_chains": 8, "num_draws": 1000,
            "num_burnin": 1000, "batch_size": 1024,
            "checkpoints": "507,1124,3247,9375,27072,59968,121212,500000",
            "data_sizes": "4096,8192,65536,1048576", "batch_sizes": "256,1024,4096",
            "fixed_sizes": "1024,4096", "setting_batch": 9,
        },
    },
}  # fmt: skip
