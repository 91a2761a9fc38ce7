"""Eight schools, from the model to ArviZ: fit a flow guide, judge it, plot the posterior.

Prints the diagnosis, a table of the posterior and the leave-one-out score; saves a forest plot.

    python examples/eight_schools.py
"""

import argparse
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyroflows import AutoFlow, diagnose, fit_guide, to_arviz

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SCHOOLS = [
    "Choate",
    "Deerfield",
    "Andover",
    "Exeter",
    "Hotchkiss",
    "Lawrence",
    "St Paul",
    "Mt Hermon",
]


def model(sigma: torch.Tensor, y: torch.Tensor | None = None) -> None:
    """Non-centered hierarchy of coaching effects (Rubin 1981)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        effect = pyro.deterministic("effect", mu + tau * z)
        pyro.sample("y", dist.Normal(effect, sigma), obs=y)


def main() -> None:
    """Fit, judge, plot."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-steps", type=int, help="fewer steps than it takes to level off")
    parser.add_argument("--num-samples", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path.cwd(), help="folder of the picture")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true")
    args = parser.parse_args()
    if args.smoke_test:
        args.num_steps, args.num_samples = 20, 100

    data = SIGMA.to(args.device), Y.to(args.device)
    guide = AutoFlow(model)
    fit_guide(model, guide, *data, num_steps=args.num_steps, seed=args.seed)
    print(diagnose(model, guide, *data))

    import arviz
    import matplotlib

    matplotlib.use("Agg")
    draws = to_arviz(model, guide, *data, num_samples=args.num_samples, coords={"school": SCHOOLS})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eight points: ArviZ finds some of them influential
        print(arviz.summary(draws, var_names=["mu", "tau", "effect"], kind="stats"))
        print(arviz.loo(draws))
        axes = arviz.plot_forest(draws, var_names=["effect"], combined=True)
    path = args.out / "eight_schools.png"
    axes[0].figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
