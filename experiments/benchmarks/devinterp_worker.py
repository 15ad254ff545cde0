"""The torch side of `compare_devinterp`: devinterp 2.0.1 on the stored problem.

Runs in an environment of its own (`make bench-devinterp`): neither JAX nor llc_jax is imported.
The models are written as a user of torch would: `nn.Linear`, `nn.LayerNorm`, fused attention and
cross entropy. Batches are row numbers, with which the loss looks the data up, the only way to give
devinterp data that are not token ids.
"""

import os

os.environ["TQDM_DISABLE"] = "1"  # no progress bar in the timings

import copy
import gc
import importlib.metadata
import pathlib
import shutil
import sys
import tempfile
import time
import warnings

import numpy as np
import torch
from devinterp.slt.llc import llc
from torch import nn
from torch.nn import functional

from experiments.benchmarks import compare_worker

TRIAL_STEPS = 12


class Quadratic(nn.Module):
    """The mean over examples of Σ h w²/2, the same for every example."""

    def __init__(self, params, options):
        super().__init__()
        self.w = nn.Parameter(params["w"])

    def forward(self, batch):
        """Returns the losses [batch]."""
        return (0.5 * (batch["h"] * self.w**2).sum(-1)).float()


class DeepLinear(nn.Module):
    """W_L ... W_1 x against y, multiplied in the cheapest order, like its counterpart."""

    def __init__(self, params, options):
        super().__init__()
        self.layers = nn.ParameterList([params[k].T.contiguous() for k in sorted(params)])

    def forward(self, batch):
        """Returns the losses [batch]."""
        outputs = torch.linalg.multi_dot([batch["x"], *self.layers])
        return ((outputs - batch["y"]) ** 2).sum(-1)


def linear(params, name):
    """An `nn.Linear` with the weights `name` of a Linen `Dense`."""
    kernel, bias = params[f"{name}/kernel"], params.get(f"{name}/bias")
    layer = nn.Linear(*kernel.shape, bias=bias is not None)
    layer.weight = nn.Parameter(kernel.T.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def layer_norm(params, name):
    """An `nn.LayerNorm` with the weights `name` of a Linen `LayerNorm`."""
    layer = nn.LayerNorm(params[f"{name}/scale"].shape[0], eps=1e-5)
    layer.weight, layer.bias = (nn.Parameter(params[f"{name}/{x}"]) for x in ("scale", "bias"))
    return layer


class Attention(nn.Module):
    """Causal self-attention without biases; q, k, v are adjacent within a head."""

    def __init__(self, params, name, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = linear(params, f"{name}/qkv"), linear(params, f"{name}/out")

    def forward(self, x):
        """Maps [B, T, C] to the same shape."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, self.num_heads, 3, -1)
        q, k, v = (qkv[:, :, :, i].transpose(1, 2) for i in range(3))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm attention, and an MLP if there is one."""

    def __init__(self, params, name, num_heads):
        super().__init__()
        self.attention_norm = layer_norm(params, f"{name}/attention_norm")
        self.attention = Attention(params, f"{name}/attention", num_heads)
        self.mlp = None
        if f"{name}/mlp/up/kernel" in params:
            self.mlp_norm = layer_norm(params, f"{name}/mlp_norm")
            up, down = (linear(params, f"{name}/mlp/{x}") for x in ("up", "down"))
            self.mlp = nn.Sequential(up, nn.ReLU(), down)

    def forward(self, x):
        """Maps [B, T, C] to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """What the two transformers share."""

    def __init__(self, params, options):
        super().__init__()
        self.position = nn.Parameter(params["position_embed"])
        names = [f"block_{i}" for i in range(options["num_layers"])]
        self.blocks = nn.Sequential(*[Block(params, k, options["num_heads"]) for k in names])
        self.final_norm = layer_norm(params, "final_norm")
        self.unembed = linear(params, "unembed")

    def stream(self, x):
        """Maps embedded tokens [B, T, C] to outputs."""
        return self.unembed(self.final_norm(self.blocks(x + self.position[: x.shape[1]])))


class Regression(Transformer):
    """`llc_jax.problems.regression.model`, on the tokens (0, x_1), (y_1, 0), ..."""

    def __init__(self, params, options):
        super().__init__(params, options)
        self.token_embed = linear(params, "token_embed")

    def forward(self, batch):
        """Returns the losses [batch]."""
        outputs = self.stream(self.token_embed(batch["tokens"]))
        return ((outputs[:, ::2, 0] - batch["y"]) ** 2).mean(-1)


class Language(Transformer):
    """Attention only, on token ids."""

    def __init__(self, params, options):
        super().__init__(params, options)
        self.token_embed = nn.Embedding.from_pretrained(params["token_embed"], freeze=False)

    def forward(self, batch):
        """Returns the losses [batch]."""
        tokens = batch["tokens"]
        logits = self.stream(self.token_embed(tokens[:, :-1]))
        losses = functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        return losses.view(len(tokens), -1).mean(-1)


MODELS = {
    "quadratic": Quadratic,
    "deep_linear": DeepLinear,
    "regression": Regression,
    "language": Language,
}


class Rows(torch.utils.data.Dataset):
    """Row numbers as devinterp wants them: pairs of token ids.

    A list of ready rows, since a `datasets.Dataset` takes longer to be read than a small network
    to be differentiated.
    """

    def __init__(self, length: int):
        ids = torch.stack([torch.arange(length), torch.zeros(length, dtype=torch.long)], 1)
        self.rows = [{"input_ids": row} for row in ids.unbind()]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


def main(folder: pathlib.Path) -> None:
    """Serves runs of devinterp on the problem in `folder`."""
    warnings.simplefilter("ignore")  # that the samples are not kept
    compare_worker.forget_peak()
    baseline = compare_worker.peak_bytes()
    stored = compare_worker.load(folder)
    settings = stored.settings
    model = MODELS[stored.kind](
        {name: torch.tensor(x) for name, x in stored.params.items()}, stored.options
    )
    data = {name: torch.tensor(x) for name, x in stored.data.items()}
    data = {name: x if x.is_floating_point() else x.long() for name, x in data.items()}
    n = len(next(iter(data.values())))
    rows = Rows(n)

    def loss_fn(module, ids):
        chosen = ids[:, 0]
        return module({name: x[chosen] for name, x in data.items()})[:, None]

    def run(num_draws: int, num_burnin: int, seed: int) -> dict[str, np.ndarray]:
        output = pathlib.Path(tempfile.mkdtemp(dir=folder))
        result = llc(
            model, rows, {},
            lr=settings["step_size"], n_beta=settings["nbeta"],
            localization=settings["localization"], num_chains=settings["num_chains"],
            num_draws=num_draws, num_burnin_steps=num_burnin, batch_size=settings["batch_size"],
            # Independent minibatches for each chain: the error of the mean is smaller.
            match_sampling_input_ids_across_chains=False,
            init_seed=100 + seed * settings["num_chains"],
            loss_fn=loss_fn, device="cpu", output_path=output / "samples.zarr",
        )  # fmt: skip
        arrays = {
            "losses": result["loss_trace"].values, "init_loss": np.asarray(result["init_loss"])
        }  # fmt: skip
        shutil.rmtree(output)
        return arrays

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        run(2, 0, 0)
        start = time.perf_counter()
        run(TRIAL_STEPS, 0, 0)
        return time.perf_counter() - start

    with torch.no_grad():
        shifted = copy.deepcopy(model)
        for parameter in shifted.parameters():
            parameter += compare_worker.SHIFT
        first = shifted({name: x[: len(stored.check)] for name, x in data.items()})
        agreement = compare_worker.check_agreement(stored, first.numpy())
        del shifted, first
        chunks = torch.arange(n).split(settings["batch_size"])
        at_anchor = torch.cat([model({name: x[c] for name, x in data.items()}) for c in chunks])
        deviation = float(at_anchor.double().std(correction=0))
    gc.freeze()  # devinterp collects garbage around every chain: spare it what was here before
    threads = min((1, len(os.sched_getaffinity(0))), key=seconds)
    torch.set_num_threads(threads)
    compare_worker.serve(
        {
            "baseline_bytes": baseline, "threads": threads, "agreement": agreement,
            "example_deviation": deviation, "torch": torch.__version__,
            "devinterp": importlib.metadata.version("devinterp"),
        },
        run,
    )  # fmt: skip


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
