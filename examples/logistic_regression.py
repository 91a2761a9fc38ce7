"""Logistic regression on the wines: which measurements make a good one? A flow guide beside NUTS.

Prints, for each coefficient, posterior mean and standard deviation by both, and processor time.

    python examples/logistic_regression.py
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

from pyroflows import AutoFlow, diagnose, fit_guide

DATA = Path(__file__).parent / "data" / "wine_quality.csv.gz"


def model(x: torch.Tensor, y: torch.Tensor) -> None:
    """Coefficients with a common scale, which the data set."""
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    prior = dist.Normal(torch.zeros(x.shape[1], device=x.device), scale[..., None]).to_event(1)
    b = pyro.sample("b", prior)
    logits = intercept[..., None] + b @ x.T
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def main() -> None:
    """Fit both and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-rows", type=int, default=2000)
    parser.add_argument("--num-steps", type=int, help="fewer steps than it takes to level off")
    parser.add_argument("--num-samples", type=int, default=1000, help="draws of NUTS")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    if args.smoke_test:
        args.num_rows, args.num_steps, args.num_samples = 100, 20, 20

    wine = pd.read_csv(DATA).sample(args.num_rows, random_state=args.seed)
    good = wine.pop("quality") >= 7
    wine = wine.select_dtypes("number")
    wine = (wine - wine.mean()) / wine.std()
    x = torch.tensor(wine.to_numpy(), dtype=torch.float32, device=args.device)
    y = torch.tensor(good.to_numpy(), dtype=torch.float32, device=args.device)

    begun = time.process_time()
    guide = AutoFlow(model)
    fit_guide(model, guide, x, y, num_steps=args.num_steps, seed=args.seed)
    flow_seconds = time.process_time() - begun
    print(diagnose(model, guide, x, y))
    flow = guide.sample_posterior(4000)["b"]

    begun = time.process_time()
    pyro.set_rng_seed(args.seed)
    mcmc = MCMC(NUTS(model), args.num_samples, args.num_samples // 2, disable_progbar=True)
    mcmc.run(x, y)
    nuts_seconds = time.process_time() - begun
    nuts = mcmc.get_samples()["b"]

    print(f"\n{'coefficient':24s}{'AutoFlow':>18s}{'NUTS':>18s}")
    for i, name in enumerate(wine.columns):
        cells = [f"{b[:, i].mean():9.3f} ({b[:, i].std():.3f})" for b in (flow, nuts)]
        print(f"{name:24s}" + "".join(f"{cell:>18s}" for cell in cells))
    error = ((flow.mean(0) - nuts.mean(0)).abs() / nuts.std(0)).max()
    print(f"largest difference of means: {error:.2f} posterior sd")
    print(f"processor seconds: AutoFlow {flow_seconds:.1f}, NUTS {nuts_seconds:.1f}")


if __name__ == "__main__":
    main()
