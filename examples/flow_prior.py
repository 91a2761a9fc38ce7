"""A learned flow as the prior of a Pyro model: repair wines of which half the columns are lost.

A flow learns the density of six columns from complete wines. It is then the prior of a model that
sees only three of them, with noise; a flow guide and NUTS both sample the other three.

    python examples/flow_prior.py
"""

import argparse
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

from pyroflows import AutoFlow, Flow, fit, fit_guide, neural_spline

DATA = Path(__file__).parent / "data" / "wine_quality.csv.gz"
COLUMNS = ["alcohol", "density", "residual_sugar", "pH", "fixed_acidity", "chlorides"]
SEEN, NOISE = 3, 0.1


def model(prior: Flow, seen: torch.Tensor) -> None:
    """A wine from the flow; its first columns are seen with noise."""
    x = pyro.sample("x", prior())
    pyro.sample("seen", dist.Normal(x[..., :SEEN], NOISE).to_event(1), obs=seen)


def main() -> None:
    """Learn the prior; infer one wine by both methods; score many by the guide."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, help="sweeps over the complete wines")
    parser.add_argument("--num-steps", type=int, default=300, help="steps of each guide")
    parser.add_argument("--num-samples", type=int, default=300, help="draws of NUTS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    if args.smoke_test:
        args.epochs, args.num_steps, args.num_samples = 1, 5, 5

    wine = pd.read_csv(DATA)[COLUMNS].sample(frac=1, random_state=args.seed)
    wine = (wine - wine.mean()) / wine.std()
    x = torch.tensor(wine.to_numpy(), dtype=torch.float32)
    train, test = x[:-100], x[-100:]

    pyro.set_rng_seed(args.seed)
    prior = neural_spline(len(COLUMNS), num_transforms=4, hidden_dims=[64, 64])
    print(fit(prior, train, num_epochs=args.epochs, seed=args.seed))
    prior.requires_grad_(False).eval()  # a fixed prior from here on

    lost = test[0, SEEN:]
    guide = AutoFlow(lambda seen: model(prior, seen))
    fit_guide(
        lambda seen: model(prior, seen),
        guide,
        test[0, :SEEN],
        num_steps=args.num_steps,
        seed=args.seed,
        progress=False,
    )
    by_flow = guide.sample_posterior(2000)["x"][:, SEEN:]
    mcmc = MCMC(NUTS(model), args.num_samples, args.num_samples // 2, disable_progbar=True)
    mcmc.run(prior, test[0, :SEEN])
    by_nuts = mcmc.get_samples()["x"][:, SEEN:]
    print(f"\n{'lost column':16s}{'truth':>8s}{'AutoFlow':>18s}{'NUTS':>18s}")
    for i, name in enumerate(COLUMNS[SEEN:]):
        cells = [f"{d[:, i].mean():.2f} ({d[:, i].std():.2f})" for d in (by_flow, by_nuts)]
        print(f"{name:16s}{lost[i]:8.2f}" + "".join(f"{cell:>18s}" for cell in cells))


if __name__ == "__main__":
    main()
