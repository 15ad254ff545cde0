"""Settings of the benchmarks on deep linear networks, by preset and experiment."""

# Draws of λ̂ vary less, relative to it, the larger it is: a shorter grid tells as much.
LARGE = {"num_chains": 2, "num_draws": 1000, "nbeta_factors": "1"}

PRESETS = {
    "smoke": {
        "benchmark_dln": {
            "workdir": "runs/dln-smoke", "num_networks": 1, "num_draws": 100, "num_burnin": 100,
        },
        "locality": {
            "workdir": "runs/locality-smoke", "networks": "4", "localizations": "3,30000",
            "num_draws": 200, "num_burnin": 100,
        },
    },
    "1K": {"benchmark_dln": {"workdir": "runs/dln-1K", "class_name": "1K"}},
    "10K": {"benchmark_dln": {"workdir": "runs/dln-10K", "class_name": "10K"}},
    "100K": {
        "benchmark_dln": {
            "workdir": "runs/dln-100K", "class_name": "100K", "num_networks": 6, **LARGE,
        },
    },
    "1M": {
        "benchmark_dln": {
            "workdir": "runs/dln-1M", "class_name": "1M", "num_networks": 2, **LARGE,
        },
    },
    "two": {"locality": {"workdir": "runs/locality"}},
}  # fmt: skip
