"""A latent-variable model of the wines with an amortized flow guide, trained on minibatches.

Each wine has two latent numbers; a network decodes them into its measurements (Kingma and Welling
2014). Beside it the same guide with a Gaussian in place of the flow: how much a flow adds depends
on how far a row's posterior is from normal, and here it is near.

    python examples/amortized.py
"""

import argparse
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyroflows import AmortizedFlow, fit_guide
from pyroflows.guides.amortized import local_flow

DATA = Path(__file__).parent / "data" / "wine_quality.csv.gz"
LATENTS, HIDDEN = 2, 64


def network(inputs: int, outputs: int) -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, outputs))


class Wines(pyro.nn.PyroModule):
    """x = decoder(z) + noise, row by row; the decoder and the noise are learned."""

    def __init__(self, columns: int, batch_size: int) -> None:
        super().__init__()
        self.decoder = network(LATENTS, columns)
        self.log_noise = nn.Parameter(torch.zeros(columns))
        self.batch_size = batch_size

    def forward(self, x: torch.Tensor) -> None:
        """Run the model on a random minibatch of the rows ``x``."""
        with pyro.plate("wine", len(x), subsample_size=min(self.batch_size, len(x))):
            batch = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS).to(x), 1.0).to_event(1))
            noise = self.log_noise.exp()
            pyro.sample("x", dist.Normal(self.decoder(z), noise).to_event(1), obs=batch)


def main() -> None:
    """Train with a Gaussian guide and with a flow; compare the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    if args.smoke_test:
        args.num_steps = 10

    wine = pd.read_csv(DATA).select_dtypes("number")
    wine = (wine - wine.mean()) / wine.std()
    x = torch.tensor(wine.to_numpy(), dtype=torch.float32, device=args.device)
    for name, layers in (("Gaussian", 0), ("flow", 6)):
        pyro.clear_param_store()
        pyro.set_rng_seed(args.seed)
        model = Wines(x.shape[1], args.batch_size).to(x.device)

        def local(latents: int, context: int, layers: int = layers) -> nn.Module:
            return local_flow(latents, context, num_layers=layers)

        encoder = network(x.shape[1], 32).to(x.device)
        guide = AmortizedFlow(model, encoder, 32, local=local)
        fit_guide(
            model, guide, x, num_steps=args.num_steps, num_particles=1, lr=3e-3, progress=False
        )
        with torch.no_grad():
            losses = [Trace_ELBO().loss(model, guide, x) for _ in range(50)]
        print(f"{name:10s} ELBO {-sum(losses) / len(losses) / len(x):.3f} nats a wine", flush=True)


if __name__ == "__main__":
    main()
